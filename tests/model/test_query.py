"""Cells of new batches (scArches)."""

from __future__ import annotations

import numpy as np
import pytest
import scvi
import torch

from scvi_sams import SAMSVAE, UnknownPerturbationError

from .conftest import COVARIATES, QUIET, SETUP, add_covariates, fit, small_screen


def _query_screen(**batches):
    """New cells of the screen the models were fitted to, in other batches."""
    query = add_covariates(small_screen())[100:500].copy()
    names = {"replicate_1": "new_1", "replicate_2": "new_2"} | batches
    query.obs["replicate"] = query.obs["replicate"].astype(str).map(names)
    return query


def _covariate_columns(model, network):
    """Categories of a network's first layer, by covariate."""
    layers = getattr(model.module, network).hidden
    weight = layers.fc_layers[0][0].weight.detach()
    columns = weight[:, weight.shape[1] - sum(layers.n_cat_list) :]
    return torch.split(columns, layers.n_cat_list, dim=1)


@pytest.fixture(scope="module")
def query(fitted_covariates):
    return SAMSVAE.load_query_data(_query_screen(), fitted_covariates, accelerator="cpu")


@pytest.fixture(scope="module", params=["closed_form", "gradient"])
def trained(request):
    """A model and what became of it in training on the cells of a new batch."""
    adata = add_covariates(small_screen())
    SAMSVAE.setup_anndata(adata, **SETUP, **COVARIATES)
    arguments = {"global_inference": request.param, "n_layers": 2, "encode_covariates": True}
    model = fit(adata, max_epochs=4, **arguments)
    query = SAMSVAE.load_query_data(_query_screen(), model, accelerator="cpu")
    before = {name: value.clone() for name, value in query.module.state_dict().items()}
    query.train(max_epochs=3, **QUIET)
    return query, before


class TestStart:
    @pytest.mark.parametrize("network", ["encoder", "decoder"])
    def test_covariates_keep_their_weights(self, fitted_covariates, query, network):
        old_batch, old_phase = _covariate_columns(fitted_covariates, network)
        batch, phase = _covariate_columns(query, network)
        np.testing.assert_array_equal(phase, old_phase)
        np.testing.assert_array_equal(batch[:, :2], old_batch)
        new = old_batch.mean(1, keepdim=True).expand(-1, 2)
        np.testing.assert_allclose(batch[:, 2:], new, atol=1e-7)

    def test_basal_means_start_at_the_others(self, fitted_covariates, query):
        old = fitted_covariates.module.closed_form.basal_mean
        new = query.module.closed_form.basal_mean
        assert old.abs().max() > 1e-3
        np.testing.assert_array_equal(new[:2], old)
        np.testing.assert_allclose(new[2:], old.mean(0).expand(2, -1), atol=1e-7)

    def test_known_batches_are_decoded_as_before(self, fitted_covariates, query):
        states = torch.randn(4, 6)
        arguments = {
            "library": torch.full((4, 1), 1e3),
            "batch_index": torch.tensor([[0], [1], [0], [1]]),
            "cat_covs": torch.tensor([[0], [1], [2], [2]]),
            "cont_covs": torch.zeros(4, 1),
        }
        with torch.inference_mode():
            old, new = (
                model.module.generative(states, **arguments)["px"].scale
                for model in (fitted_covariates, query)
            )
        np.testing.assert_allclose(new, old, rtol=1e-5)

    def test_reference_of_one_batch(self):
        """One batch has no weights, so those of a second are new for both."""
        adata = small_screen(n_batches=1)
        SAMSVAE.setup_anndata(adata, **SETUP, batch_key="replicate")
        model = fit(adata, max_epochs=2)
        query = SAMSVAE.load_query_data(
            _query_screen(replicate_1="replicate_1"), model, accelerator="cpu"
        )
        (batch,) = _covariate_columns(query, "decoder")[:1]
        np.testing.assert_array_equal(batch, torch.zeros(32, 2))

    def test_saved_reference(self, fitted_covariates, query, tmp_path):
        fitted_covariates.save(str(tmp_path / "model"))
        from_folder = SAMSVAE.load_query_data(
            _query_screen(), str(tmp_path / "model"), accelerator="cpu"
        )
        for name, value in query.module.state_dict().items():
            np.testing.assert_array_equal(from_folder.module.state_dict()[name], value)


class TestTraining:
    def test_globals_stay(self, trained):
        query, before = trained
        after = query.module.state_dict()
        kept = [name for name in before if name.startswith(("effects.", "closed_form."))]
        assert "effects.mask_logits" in kept
        for name in kept:
            np.testing.assert_array_equal(after[name], before[name], err_msg=name)

    def test_networks_stay_but_for_covariates(self, trained):
        query, before = trained
        changed = {
            name
            for name, value in query.module.state_dict().items()
            if name.startswith(("encoder.", "decoder.", "px_r"))
            and not torch.equal(value, before[name])
        }
        expected = {f"{net}.hidden.fc_layers.Layer 0.0.weight" for net in ("encoder", "decoder")}
        assert expected <= changed
        for name in changed:
            after, old = query.module.state_dict()[name], before[name]
            assert name.endswith(".0.weight"), name
            # Categories come last: four batches and three phases.
            np.testing.assert_array_equal(after[:, :-7], old[:, :-7])
            np.testing.assert_array_equal(after[:, -7:-5], old[:, -7:-5])  # batches not in it
            assert not torch.equal(after[:, -5:-3], old[:, -5:-3])

    def test_read_out(self, trained):
        query, _ = trained
        assert np.isfinite(query.get_latent_representation()).all()
        assert query.predict(["P001"], n_samples=3, batch="new_1").n_obs == 3
        assert query.predict(["P001"], n_samples=3, batch="replicate_2").n_obs == 3
        assert np.isfinite(query.get_elbo(n_samples=2))

    def test_fits_the_new_batch(self, fitted_covariates):
        """A gene that is not captured in the new batches alone is learned."""
        screen = _query_screen()
        counts = screen.layers["counts"].tolil()
        gene = int(np.argmax(screen.layers["counts"].sum(0)))
        counts[:, gene] = 0
        screen.layers["counts"] = counts.tocsr()
        model = SAMSVAE.load_query_data(screen, fitted_covariates, accelerator="cpu")
        model.is_trained_ = True
        scvi.settings.seed = 0
        before = model.get_reconstruction_error()["reconstruction_loss"]
        model.train(max_epochs=30, batch_size=32, **QUIET)
        after = model.get_reconstruction_error()["reconstruction_loss"]
        assert abs(after) < abs(before) - 1

    def test_unfrozen(self, fitted_covariates):
        model = SAMSVAE.load_query_data(
            _query_screen(), fitted_covariates, unfrozen=True, accelerator="cpu"
        )
        before = fitted_covariates.get_perturbation_effect()
        model.train(max_epochs=2, plan_kwargs={"global_update_every": 2}, **QUIET)
        assert (model.get_perturbation_effect() != before).any(axis=None)


class TestPerturbations:
    def test_unknown(self, fitted_covariates):
        screen = _query_screen()
        screen.obs["perturbation"] = screen.obs["perturbation"].str.replace("P002", "P099")
        with pytest.raises(UnknownPerturbationError, match="P099"):
            SAMSVAE.load_query_data(screen, fitted_covariates, accelerator="cpu")

    def test_missing(self, fitted_covariates):
        screen = _query_screen()
        screen = screen[~screen.obs["perturbation"].str.contains("P002|P006")].copy()
        model = SAMSVAE.load_query_data(screen, fitted_covariates, accelerator="cpu")
        model.train(max_epochs=1, **QUIET)
        assert model.perturbation_names == fitted_covariates.perturbation_names
        np.testing.assert_array_equal(
            model.get_perturbation_shift(["P002"]),
            fitted_covariates.get_perturbation_shift(["P002"]),
        )

    def test_permuted_columns(self):
        adata, screen = small_screen(), _query_screen()
        names = [f"P{number:03d}" for number in range(1, 7)]
        order = [5, 3, 0, 1, 2, 4]
        for cells, columns in ((adata, range(6)), (screen, order)):
            own = [names[column] for column in columns]
            parts = cells.obs["perturbation"].str.split("+", regex=False)
            cells.obsm["doses"] = np.array([[float(x in part) for x in own] for part in parts])
            cells.uns["guides"] = own
        SAMSVAE.setup_anndata(
            adata,
            "counts",
            dosage_key="doses",
            perturbation_names_uns_key="guides",
            batch_key="replicate",
        )
        model = fit(adata, max_epochs=3)
        query = SAMSVAE.load_query_data(screen, model, accelerator="cpu")
        query.train(max_epochs=1, **QUIET)
        np.testing.assert_allclose(
            query.get_latent_representation(representation="perturbation"),
            model.get_latent_representation(representation="perturbation")[100:500],
            atol=1e-6,
        )
