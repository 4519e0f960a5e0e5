"""Perturbations that a fitted model has not seen."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scvi
import torch

from scvi_sams import SAMSVAE, ConditionalVAE, UnknownPerturbationError, tl
from scvi_sams.evaluation import effect_correlation
from scvi_sams.model.query import ROW_TENSORS
from scvi_sams.module.posteriors import POSTERIORS, MaskPrior
from scvi_sams.module.statistics import RunningStatistics

from ._members import MEMBERS, fit_member, read_outs, tiny_screen
from ._simulations import fit_recovery, recovery_screen, true_effects
from .conftest import COVARIATES, QUIET

NEW = ["P003", "P006"]  # in between the others: known names come first all the same
KNOWN = ["P001", "P002", "P004", "P005"]
SETTINGS = {
    "closed form": {"global_inference": "closed_form"},
    "gradient": {"global_inference": "gradient"},
    "correlated embedding": {"basal_posterior": "amortized", "embedding_posterior": "correlated"},
    "learned prior": {"mask_prior": (1.0, 5.0), "mask_prior_shared_by": "perturbation"},
    "dose response": {"dose_response": "hill"},
    "direct effects": {"direct_effects": {"P001": "gene_01", "P003": "gene_02"}},
    "interactions": {"interactions": [("P001", "P002"), ("P004", "P005")]},
    "interactions, gradient": {
        "interactions": [("P001", "P002"), ("P004", "P005")],
        "global_inference": "gradient",
    },
}
# Restricted to perturbations that the reference knows.
REFERENCE_ONLY = {"direct_effects": {"P001": "gene_01"}}


def split_screen(**kwargs):
    """Cells of known perturbations (and controls), and cells of a query with new ones."""
    pairs = {"P001+P002", "P004+P005"}
    adata = tiny_screen(n_cells=500, n_pairs=12, **kwargs)
    parts = adata.obs["perturbation"].astype(str).str.split("+")
    is_new = parts.map(lambda names: bool(set(names) & set(NEW))).to_numpy()
    is_known_pair = adata.obs["perturbation"].isin(pairs).to_numpy()
    in_query = is_new | (np.arange(adata.n_obs) % 5 == 0) & ~is_known_pair
    return adata[~in_query].copy(), adata[in_query].copy()


def fit_reference(setting="closed form", member="SAMSVAE", covariates=False, **kwargs):
    reference, query = split_screen()
    arguments = SETTINGS[setting] | kwargs
    if "direct_effects" in arguments:
        arguments |= REFERENCE_ONLY
    return fit_member(member, reference, covariates=covariates, **arguments), query


def load_query(query, model, **kwargs):
    arguments = {"new_perturbations": True, "accelerator": "cpu"} | kwargs
    return type(model).load_query_data(query, model, **arguments)


def assert_known_stay(model, extended):
    """Networks, frame, and everything of known perturbations stay, bit for bit."""
    before, after = model.module.state_dict(), extended.module.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        frozen = ("effects.frozen", "effects.n_frozen")
        if name.startswith(("closed_form.statistics", "n_training_cells", *frozen)):
            continue  # of the cells in training, not of the model
        new = after[name]
        if new.shape != value.shape:
            parts = ("effects.", "dose_response.", "direct_effects.", "gene_effects.")
            assert name.startswith(parts), name
            new = new[: len(KNOWN)]
            value = value[: len(KNOWN)]
        np.testing.assert_array_equal(new, value, err_msg=name)
    # Read-outs of the same bits, by vector instructions that depend on the number of rows.
    methods = ["get_perturbation_effect"]
    if model.module.effects.sparse:
        methods.append("get_perturbation_mask")
    for method in methods:
        found, expected = (getattr(which, method)().loc[KNOWN] for which in (extended, model))
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    conditions = [*KNOWN, "P001+P004", "P001+P002", "P004+P005"]
    found, expected = (which.get_perturbation_shift(conditions) for which in (extended, model))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


@pytest.fixture(scope="module", params=SETTINGS)
def extended(request):
    """A model, and what a query with new perturbations made of it."""
    model, query = fit_reference(request.param)
    scvi.settings.seed = 0
    found = load_query(query, model)
    found.train(max_epochs=4, batch_size=64, **QUIET)
    return model, found


class TestRowsOfPairs:
    """scvi-tools appends rows of new perturbations after those of pairs; they go before."""

    @pytest.mark.parametrize("family", POSTERIORS)
    def test_are_told_by_name(self, family):
        effects = POSTERIORS[family](MaskPrior(11, 3, n_pairs=2))
        statistics = RunningStatistics(13, 3)
        rows = {
            name
            for part in (effects, statistics)
            for name, tensor in part.state_dict().items()
            if tensor.dim() and len(tensor) == 13
        }
        assert rows - {"frozen"} <= ROW_TENSORS
        assert {"slab_mean", "linear"} <= rows

    @pytest.mark.parametrize("n_latent", [5, 8])
    def test_what_is_as_large_stays(self, n_latent):
        """Eight rows in the query, of six perturbations and two pairs: as many as latents."""
        model, query = fit_reference("interactions", n_latent=n_latent)
        turned = torch.linalg.qr(torch.randn(n_latent, n_latent)).Q
        model.module.effects.rotation.copy_(turned)
        extended = load_query(query, model)
        assert extended.module.effects.n_rows == 8
        assert torch.equal(extended.module.effects.rotation, turned)
        extended.is_trained_ = True
        assert_known_stay(model, extended)

    def test_masks_that_are_given_stay_given(self):
        model, query = fit_reference("interactions", mask_prior=1.0)
        given = load_query(query, model).module.effects.mask_prior.given.flatten()
        assert given.tolist() == [True] * 6 + [False] * 2


class TestTraining:
    def test_names(self, extended):
        model, found = extended
        assert model.perturbation_names == KNOWN
        assert found.perturbation_names == [*KNOWN, *NEW]

    def test_known_stay(self, extended):
        assert_known_stay(*extended)

    def test_new_are_learned(self, extended):
        _, found = extended
        effect = found.get_perturbation_effect().loc[NEW]
        assert np.isfinite(effect).all(axis=None)
        shift = found.get_perturbation_shift([*NEW, "P003+P006", "P001+P003"])
        assert np.abs(shift).max(axis=1).min() > 0
        np.testing.assert_allclose(shift.iloc[2], shift.iloc[0] + shift.iloc[1], atol=1e-5)

    def test_read_outs(self, extended):
        model, found = extended
        for name, value in read_outs(found, [*NEW, "P001+P003"]).items():
            assert np.isfinite(value).all(), name
        assert found.get_average_treatment_effect(n_samples=2).obs_names.tolist() == [
            *KNOWN,
            *NEW,
        ]
        with pytest.raises(UnknownPerturbationError, match="P003"):
            model.predict(["P003"])

    def test_saved(self, extended, tmp_path):
        _, found = extended
        found.save(str(tmp_path / "query"))
        loaded = SAMSVAE.load(str(tmp_path / "query"), found.adata.copy(), accelerator="cpu")
        assert loaded.perturbation_names == found.perturbation_names
        expected = read_outs(found, NEW)
        for name, value in read_outs(loaded, NEW).items():
            np.testing.assert_array_equal(value, expected[name], err_msg=name)

    def test_same_seed_same_bits(self, extended):
        model, found = extended
        scvi.settings.seed = 0
        again = load_query(split_screen()[1], model)
        again.train(max_epochs=4, batch_size=64, **QUIET)
        for name, value in found.module.effects.state_dict().items():
            np.testing.assert_array_equal(
                again.module.effects.state_dict()[name], value, err_msg=name
            )


class TestPairs:
    def test_rows_move_after_the_new_perturbations(self):
        """Where pairs are looked for: after all perturbations, before training already."""
        model, query = fit_reference("interactions", interaction_prior=0.2)
        extended = load_query(query, model)
        old, new = model.module, extended.module
        assert old.effects.n_rows == 6
        assert new.effects.n_rows == 8
        for name in ("slab_mean", "mask_logits", "slab_log_variance", "spike_mean"):
            before, after = getattr(old.effects, name), getattr(new.effects, name)
            assert before[:6].unique(dim=0).shape[0] > 1
            np.testing.assert_array_equal(after[:4].detach(), before[:4].detach())
            np.testing.assert_array_equal(after[6:].detach(), before[4:].detach())
        extended.is_trained_ = True
        found, expected = tl.interaction_effects(extended), tl.interaction_effects(model)
        pd.testing.assert_frame_equal(found, expected, rtol=1e-6)
        assert found["pair"].unique().tolist() == ["P001+P002", "P004+P005"]
        assert expected["effect"].any()


class TestNames:
    def test_unknown_without_the_flag(self):
        model, query = fit_reference(max_epochs=1)
        with pytest.raises(UnknownPerturbationError, match=r"'P003'.*new_perturbations=True"):
            SAMSVAE.load_query_data(query, model, accelerator="cpu")

    def test_nothing_new(self):
        """The flag alone changes nothing: known perturbations are no news."""
        model, _ = fit_reference(max_epochs=2)
        query = load_query(split_screen()[0], model)
        assert query.perturbation_names == KNOWN
        assert not query.learns_effects_only_
        assert query.module.effects.frozen.all()
        query.train(max_epochs=1, **QUIET)
        assert_known_stay(model, query)

    def test_saved_reference(self, tmp_path):
        model, query = fit_reference(max_epochs=2)
        model.save(str(tmp_path / "model"))
        loaded = SAMSVAE.load_query_data(
            query, str(tmp_path / "model"), new_perturbations=True, accelerator="cpu"
        )
        for name, value in load_query(split_screen()[1], model).module.state_dict().items():
            np.testing.assert_array_equal(loaded.module.state_dict()[name], value, err_msg=name)

    def test_twice(self):
        """A query of a query keeps what the first one learned."""
        model, query = fit_reference()
        first = query[query.obs["perturbation"].isin(["control", "P003"])].copy()
        second = query[query.obs["perturbation"].isin(["control", "P006"])].copy()
        once = load_query(first, model)
        once.train(**QUIET)
        twice = load_query(second, once)
        assert twice.perturbation_names == [*KNOWN, "P003", "P006"]
        twice.train(**QUIET)
        np.testing.assert_array_equal(
            twice.get_perturbation_shift([*KNOWN, "P003"]),
            once.get_perturbation_shift([*KNOWN, "P003"]),
        )

    def test_unfrozen(self):
        model, query = fit_reference(max_epochs=2)
        extended = load_query(query, model, unfrozen=True)
        extended.train(max_epochs=2, **QUIET)
        assert extended.perturbation_names == [*KNOWN, *NEW]
        weight = "decoder.logits.weight"
        assert not torch.equal(
            extended.module.state_dict()[weight], model.module.state_dict()[weight]
        )

    @pytest.mark.parametrize("engine", ["closed_form", "gradient"])
    def test_new_batches_too(self, engine):
        model, query = fit_reference(covariates=True, global_inference=engine)
        query.obs["replicate"] = "replicate_3"
        extended = load_query(query, model)
        before = {name: value.clone() for name, value in extended.module.state_dict().items()}
        extended.train(max_epochs=3, batch_size=64, **QUIET)
        assert extended.perturbation_names == [*KNOWN, *NEW]
        after = extended.module.state_dict()
        for name in ("effects.slab_mean", "effects.mask_logits", "effects.spike_mean"):
            np.testing.assert_array_equal(after[name][:4], before[name][:4], err_msg=name)
        assert not torch.equal(after["effects.slab_mean"][4:], before["effects.slab_mean"][4:])
        first_layer = "decoder.hidden.fc_layers.Layer 0.0.weight"
        changed = {
            name
            for name, value in after.items()
            if name.startswith(("encoder.", "decoder.", "px_r"))
            and not torch.equal(value, before[name])
        }
        assert first_layer in changed
        assert all(name.endswith("hidden.fc_layers.Layer 0.0.weight") for name in changed)
        for name, value in read_outs(extended, NEW).items():
            assert np.isfinite(value).all(), name
        cells = extended.predict(NEW, n_samples=3, batch="replicate_3")
        assert set(cells.obs["batch"]) == {"replicate_3"}


class TestMembers:
    @pytest.mark.parametrize("member", ["CPAVAE", "SVAEPlus"])
    def test_trains(self, member):
        setup = {"combinations": "additive"} if member == "SVAEPlus" else None
        reference, query = split_screen()
        model = fit_member(member, reference, setup=setup)
        extended = load_query(query, model)
        extended.train(max_epochs=3, **QUIET)
        assert extended.perturbation_names == [*KNOWN, *NEW]
        assert_known_stay(model, extended)
        assert np.abs(extended.get_perturbation_shift(NEW)).max(axis=1).min() > 0

    def test_networks_cannot(self):
        reference, query = split_screen()
        model = fit_member("ConditionalVAE", reference)
        with pytest.raises(NotImplementedError, match=r"ConditionalVAE cannot.*P003.*SAMSVAE"):
            ConditionalVAE.load_query_data(query, model, new_perturbations=True, accelerator="cpu")

    @pytest.mark.parametrize("member", MEMBERS)
    def test_known_perturbations_in_new_batches(self, member):
        reference, _ = split_screen()
        model = fit_member(member, reference, covariates=True, max_epochs=2)
        query = reference.copy()
        query.obs["replicate"] = "replicate_3"
        extended = MEMBERS[member].load_query_data(query, model, accelerator="cpu")
        extended.train(max_epochs=2, **QUIET)
        for name, value in read_outs(extended, ["P001"]).items():
            assert np.isfinite(value).all(), name
        assert COVARIATES["batch_key"] in extended.adata.obs


@pytest.mark.slow
def test_agrees_with_the_joint_fit():
    """New perturbations of mechanisms that the reference shows, as if all cells were fitted."""
    screen = {"n_perturbations": 20, "mask_probability": 0.3}
    adata = recovery_screen(**screen)
    new = ["P003", "P011", "P017"]
    label = adata.obs["perturbation"]
    is_new = label.isin(new).to_numpy()
    reference = fit_recovery("SAMSVAE", adata[~is_new].copy())
    query = load_query(adata[is_new | (label == "control").to_numpy()].copy(), reference)
    query.train(**QUIET)
    joint = fit_recovery("SAMSVAE", adata)
    found, together = (model.get_average_treatment_effect(new) for model in (query, joint))
    assert effect_correlation(found, together) > 0.9
    assert effect_correlation(found, true_effects(new, **screen)) > 0.85
