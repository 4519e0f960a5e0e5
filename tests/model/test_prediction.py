from __future__ import annotations

from itertools import pairwise

import anndata
import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from scipy import sparse

from scvi_sams import SAMSVAE, ScreenError, UnknownPerturbationError
from scvi_sams.data import Conditions
from scvi_sams.model import counterfactual

from .conftest import SETUP, counts_per_library, fit, small_screen

UNSEEN = ["P001+P006", "P002+P003+P005"]


def _seeded(method, *args, seed=7, **kwargs):
    scvi.settings.seed = seed
    return method(*args, **kwargs)


def _share(cells):
    return cells.layers["normalized_expression"]


def _assert_equal(left, right):
    """Every number, name and annotation of two AnnDatas is the same."""
    pd.testing.assert_frame_equal(left.obs, right.obs)
    pd.testing.assert_frame_equal(left.var, right.var)
    assert left.uns == right.uns
    for name in [None, *left.layers]:
        matrices = (side.X if name is None else side.layers[name] for side in (left, right))
        np.testing.assert_array_equal(
            *(matrix.toarray() if sparse.issparse(matrix) else matrix for matrix in matrices)
        )


class TestConditions:
    def test_cells(self, any_fitted):
        labels = ["control", "P001", *UNSEEN]
        assert not set(UNSEEN) & set(any_fitted.adata.obs["perturbation"])
        cells = any_fitted.predict(labels, n_samples=30)
        assert cells.shape == (120, 80)
        assert cells.var_names.tolist() == any_fitted.adata.var_names.tolist()
        assert cells.obs["condition"].tolist() == np.repeat(labels, 30).tolist()
        assert cells.obs_names.is_unique
        counts = cells.X.toarray()
        assert (counts >= 0).all()
        assert (counts == counts.round()).all()
        in_panel = counts_per_library(any_fitted)
        tolerance = 1e-5 if in_panel == 1 else 0.25  # of a size factor the total is free
        np.testing.assert_allclose(_share(cells).sum(1), in_panel, rtol=tolerance)
        ratio = counts.sum(1) / cells.obs["library_size"]
        assert 0.7 < ratio.mean() / in_panel < 1.3

    def test_ways_to_write_conditions(self, fitted):
        by_label = _seeded(fitted.predict, ["P001", "P002+P004"], n_samples=5)
        for conditions in (
            [{"P001": 1}, {"P002": 1, "P004": 1}],
            np.array([[1, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 0]]),
            pd.DataFrame([[0, 1, 0], [1, 0, 1]], columns=["P004", "P001", "P002"]),
        ):
            _assert_equal(_seeded(fitted.predict, conditions, n_samples=5), by_label)

    def test_dose_scales_the_shift(self, fitted):
        doses = [{"P001": dose} for dose in (0.0, 0.5, 1.0, 2.0)]
        cells = fitted.predict(doses, n_samples=400, return_mean=True)
        distances = [np.abs(row - cells.X[0]).sum() for row in cells.X]
        assert all(nearer < further for nearer, further in pairwise(distances))

    def test_unknown(self, fitted):
        with pytest.raises(UnknownPerturbationError, match=r"P0O1.*P001"):
            fitted.predict(["P001+P0O1"])

    def test_repeated(self, fitted):
        with pytest.raises(ScreenError, match="P001"):
            fitted.predict(["P001", "P002", "P001"])

    def test_mean(self, fitted):
        cells = _seeded(fitted.predict, UNSEEN, n_samples=20)
        mean = _seeded(fitted.predict, UNSEEN, n_samples=20, return_mean=True)
        assert mean.obs_names.tolist() == UNSEEN
        for row, label in enumerate(UNSEEN):
            share = _share(cells[cells.obs["condition"] == label])
            np.testing.assert_allclose(mean.X[row], share.mean(0), rtol=1e-4)
            np.testing.assert_allclose(mean.layers["std"][row], share.std(0), rtol=1e-3, atol=1e-7)

    def test_seed(self, any_fitted):
        arguments = {"n_samples": 10, "basal": "control"}
        first = _seeded(any_fitted.predict, UNSEEN, **arguments)
        _assert_equal(_seeded(any_fitted.predict, UNSEEN, **arguments), first)
        other = _seeded(any_fitted.predict, UNSEEN, **arguments, seed=8)
        assert (other.X != first.X).nnz > 0


class TestBasal:
    def test_cell_k_is_the_same_in_every_condition(self, any_fitted):
        cells = any_fitted.predict(["control", "P001"], n_samples=6)
        columns = cells.obs.columns.drop("condition")
        halves = [
            cells.obs.loc[cells.obs["condition"] == label, columns].reset_index(drop=True)
            for label in ("control", "P001")
        ]
        pd.testing.assert_frame_equal(*halves)

    @pytest.mark.parametrize("as_adata", [False, True])
    def test_counterfactual_keeps_the_cells(self, any_fitted, monkeypatch, as_adata):
        """Without a dose, cells are decoded at their own basal state and library size."""
        indices = np.random.default_rng(0).permutation(600)[:40]
        monkeypatch.setattr(torch, "randn_like", torch.zeros_like)  # posterior means
        basal = any_fitted.adata[indices].copy() if as_adata else indices
        cells = any_fitted.predict(["control"], basal=basal)

        states = any_fitted.get_latent_representation(indices=indices, representation="basal")
        (tensors,) = any_fitted._make_data_loader(any_fitted.adata, indices=indices)
        module = any_fitted.module
        outputs = module.inference(**module._get_inference_input(tensors))
        outputs["z"] = module.to_network(torch.as_tensor(states))
        with torch.inference_mode():
            decoded = module.generative(**module._get_generative_input(tensors, outputs))
        np.testing.assert_allclose(_share(cells), decoded["px"].scale, rtol=1e-4)

        names = any_fitted.adata.obs_names[indices]
        assert cells.obs["basal_cell"].tolist() == names.tolist()
        counts = any_fitted.adata.layers["counts"][indices].sum(1)
        factor = 1 if any_fitted.summary_stats.n_batch == 1 else 2
        np.testing.assert_allclose(cells.obs["library_size"], factor * np.ravel(counts))

    def test_own_condition_agrees_with_the_counts(self, fitted):
        """What a cell would be under its own perturbation is what it is, on average."""
        indices = np.flatnonzero(fitted.adata.obs["perturbation"] == "P001")
        predicted = fitted.predict(["P001"], basal=indices, return_mean=True).X[0]
        counts = fitted.adata.layers["counts"][indices].toarray()
        observed = (counts / counts.sum(1, keepdims=True)).mean(0)
        assert np.corrcoef(np.log(predicted), np.log(observed))[0, 1] > 0.97

    def test_controls(self, fitted):
        cells = fitted.predict(["P001"], n_samples=40, basal="control")
        drawn = fitted.adata.obs.loc[cells.obs["basal_cell"], "perturbation"]
        assert set(drawn) == {"control"}
        trained_on = set(fitted.adata.obs_names[fitted.train_indices])
        assert set(cells.obs["basal_cell"]) <= trained_on

    def test_unknown(self, fitted):
        with pytest.raises(ScreenError, match="'posterior' is unknown"):
            fitted.predict(["P001"], basal="posterior")

    @pytest.mark.parametrize("library_size", [0.0, -1.0, np.nan, np.inf])
    def test_bad_library_size(self, fitted, library_size):
        with pytest.raises(ScreenError, match="library_size"):
            fitted.predict(["P001"], library_size=library_size)

    def test_no_cells(self, fitted):
        with pytest.raises(ScreenError, match="n_samples=0.*>= 1"):
            fitted.predict(["P001"], n_samples=0)

    def test_library_size(self, fitted):
        small, large = (
            _seeded(fitted.predict, ["P001"], n_samples=50, library_size=size)
            for size in (1_000.0, 50_000.0)
        )
        np.testing.assert_array_equal(_share(small), _share(large))
        assert (small.obs["library_size"] == 1_000).all()
        assert small.X.sum(1).mean() == pytest.approx(1_000, rel=0.1)
        assert large.X.sum(1).mean() == pytest.approx(50_000, rel=0.1)

    def test_library_size_is_that_of_controls(self, any_fitted):
        cells = any_fitted.predict(["P001"], n_samples=30)
        obs = any_fitted.adata.obs.iloc[any_fitted.train_indices]
        controls = obs[obs["perturbation"] == "control"]
        sizes = controls["total" if "total" in obs else "total_counts"].astype(np.float32)
        assert set(cells.obs["library_size"]) <= set(sizes)


class TestBatch:
    def test_one_for_all(self, fitted_covariates):
        predicted = {
            batch: _seeded(fitted_covariates.predict, ["P001"], n_samples=8, batch=batch)
            for batch in ("replicate_1", "replicate_2")
        }
        for batch, cells in predicted.items():
            assert set(cells.obs["batch"]) == {batch}
        first, second = map(_share, predicted.values())
        assert np.abs(first - second).max() > 1e-5

    def test_default_is_that_of_controls(self, fitted_covariates):
        cells = fitted_covariates.predict(["P001"], n_samples=60)
        assert set(cells.obs["batch"]) == {"replicate_1", "replicate_2"}

    def test_unknown(self, fitted_covariates):
        for method in (
            fitted_covariates.predict,
            fitted_covariates.get_average_treatment_effect,
        ):
            with pytest.raises(ScreenError, match=r"'replicate_9'.*replicate_1, replicate_2"):
                method(["P001"], batch="replicate_9")


class TestBlindness:
    @pytest.mark.parametrize("basal", ["prior", "control"])
    def test_never_reads_cells_of_the_condition(self, basal):
        adata = small_screen()
        SAMSVAE.setup_anndata(adata, **SETUP)
        model = fit(adata, max_epochs=2)
        conditions = sorted(set(adata.obs["perturbation"]) - {"control"})

        def read_out():
            return (
                _seeded(model.predict, conditions, n_samples=5, basal=basal),
                _seeded(
                    model.get_average_treatment_effect,
                    conditions,
                    basal=basal,
                    n_samples=3,
                    n_cells=5,
                ),
            )

        before = read_out()
        counts = adata.layers["counts"].toarray()
        perturbed = np.flatnonzero(adata.obs["perturbation"] != "control")
        counts[perturbed] = np.random.default_rng(0).poisson(3, counts[perturbed].shape)
        adata.layers["counts"] = sparse.csr_matrix(counts)
        for old, new in zip(before, read_out(), strict=True):
            _assert_equal(old, new)
        # The counts that were changed are those the model reads.
        assert model.get_latent_representation(indices=perturbed).std() > 0
        loader = model._make_data_loader(adata, indices=perturbed)
        np.testing.assert_array_equal(next(iter(loader))["X"], counts[perturbed[:128]])


class TestAverageTreatmentEffect:
    def test_labels(self, any_fitted):
        effect = any_fitted.get_average_treatment_effect(n_samples=5, n_cells=10)
        assert effect.obs_names.tolist() == any_fitted.perturbation_names
        assert effect.var_names.tolist() == any_fitted.adata.var_names.tolist()
        assert set(effect.layers) - {None} == {"lower", "upper", "std"}
        assert np.isfinite(effect.X).all()

    def test_interval(self, fitted):
        narrow, wide = (
            _seeded(fitted.get_average_treatment_effect, ["P001", *UNSEEN], credible_level=level)
            for level in (0.5, 0.95)
        )
        np.testing.assert_array_equal(narrow.X, wide.X)
        assert (wide.layers["lower"] <= wide.X).all()
        assert (wide.X <= wide.layers["upper"]).all()
        widths = [effect.layers["upper"] - effect.layers["lower"] for effect in (narrow, wide)]
        assert (widths[0] < widths[1]).all()

    @pytest.mark.parametrize("level", [0.5, 0.9])
    def test_level(self, fitted, level):
        """Between two draws quantiles are linear, and half their distance is the deviation."""
        effect = fitted.get_average_treatment_effect(
            ["P001"], n_samples=2, n_cells=10, credible_level=level
        )
        width = effect.layers["upper"] - effect.layers["lower"]
        np.testing.assert_allclose(width, 2 * level * effect.layers["std"], atol=1e-5)

    @pytest.mark.parametrize("level", [0, 1, 95])
    def test_bad_level(self, fitted, level):
        with pytest.raises(ValueError, match="credible_level"):
            fitted.get_average_treatment_effect(["P001"], credible_level=level)

    def test_bad_method(self, fitted):
        with pytest.raises(ValueError, match="'median' is unknown"):
            fitted.get_average_treatment_effect(["P001"], method="median")

    @pytest.mark.parametrize("method", ["log_normalized", "mean"])
    def test_control_is_zero(self, any_fitted, method):
        effect = any_fitted.get_average_treatment_effect(
            ["control", "P001"], method=method, n_samples=4, n_cells=10
        )
        for values in (effect.X, *effect.layers.values()):
            np.testing.assert_array_equal(values[0], 0)
        assert np.abs(effect.X[1]).max() > 0

    def test_antisymmetric(self, any_fitted):
        method = any_fitted.get_average_treatment_effect
        arguments = {"n_samples": 6, "n_cells": 10}
        there = _seeded(method, "P001+P006", reference="P002", **arguments)
        back = _seeded(method, "P002", reference="P001+P006", **arguments)
        np.testing.assert_allclose(there.X, -back.X, atol=1e-6)
        np.testing.assert_allclose(there.layers["lower"], -back.layers["upper"], atol=1e-6)
        assert np.abs(there.X).max() > 0.01

    def test_methods_agree_in_sign(self, fitted):
        log_normalized, mean = (
            fitted.get_average_treatment_effect(method=name).X.ravel()
            for name in ("log_normalized", "mean")
        )
        clear = np.abs(log_normalized) > 0.1
        assert clear.sum() > 20
        assert (np.sign(log_normalized[clear]) == np.sign(mean[clear])).mean() > 0.97

    @pytest.mark.parametrize("method", ["log_normalized", "mean"])
    def test_agrees_with_predicted_cells(self, any_fitted, method):
        """The closed form against counts drawn cell by cell."""
        labels = ["control", "P001", "P002+P003+P005"]
        cells = any_fitted.predict(labels, n_samples=4_000)
        counts = 1e4 * cells.X.toarray() / cells.obs["library_size"].to_numpy()[:, None]
        values = np.log2(1 + counts) if method == "log_normalized" else counts
        means = {label: values[cells.obs["condition"] == label].mean(0) for label in labels}
        spread = np.sqrt(
            2 * np.stack([values[cells.obs["condition"] == x].var(0) for x in labels]).max(0) / 4e3
        )
        effect = any_fitted.get_average_treatment_effect(
            labels[1:], method=method, n_samples=200, n_cells=400
        )
        for label, predicted in zip(labels[1:], effect.X, strict=True):
            brute_force = means[label] - means["control"]
            assert np.corrcoef(predicted, brute_force)[0, 1] > 0.95
            # The populations differ too, hence more than the noise of the counts.
            assert (np.abs(predicted - brute_force) < 8 * spread + 0.02).mean() > 0.95

    def test_memory_chunks(self, any_fitted, monkeypatch):
        arguments = {"n_samples": 7, "n_cells": 10}
        whole = _seeded(any_fitted.get_average_treatment_effect, **arguments)
        monkeypatch.setattr(counterfactual, "MAX_DECODED_ELEMENTS", 3 * 10 * 80)
        chunked = _seeded(any_fitted.get_average_treatment_effect, **arguments)
        # Sums of other lengths, in single precision.
        np.testing.assert_allclose(chunked.X, whole.X, atol=1e-5)
        np.testing.assert_allclose(chunked.layers["upper"], whole.layers["upper"], atol=1e-5)

    def test_batch_and_basal(self, fitted_covariates):
        method = fitted_covariates.get_average_treatment_effect
        arguments = {"n_samples": 3, "n_cells": 10}
        one = _seeded(method, "P001", batch="replicate_1", **arguments)
        other = _seeded(method, "P001", batch="replicate_2", **arguments)
        assert np.abs(one.X - other.X).max() > 1e-6
        assert np.isfinite(method("P001", basal="control", **arguments).X).all()
        assert np.isfinite(method("P001", basal=[1, 5, 9], n_samples=3).X).all()


class TestFiles:
    def test_provenance(self, fitted):
        origin = _seeded(fitted.predict, ["P001"], n_samples=2).uns["scvi_sams"]
        assert origin["model"] == "SAMSVAE"
        assert origin["seed"] == 7
        assert origin["scvi_tools"] == scvi.__version__

    def test_round_trip(self, fitted_covariates, tmp_path):
        cells = fitted_covariates.predict(UNSEEN, n_samples=4)
        effect = fitted_covariates.get_average_treatment_effect(UNSEEN, n_samples=3, n_cells=4)
        assert effect.uns["scvi_sams"]["method"] == "log_normalized"
        assert effect.uns["scvi_sams"]["credible_level"] == 0.95
        for written in (cells, effect):
            written.write_h5ad(tmp_path / "written.h5ad")
            read = anndata.read_h5ad(tmp_path / "written.h5ad")
            read.uns["scvi_sams"] = {
                key: value.item() if isinstance(value, np.generic) else value
                for key, value in read.uns["scvi_sams"].items()
            }
            _assert_equal(read, written)


class TestNoise:
    """What is uncertain is in the intervals; means have little noise of the cells and draws."""

    def test_cells_fill_the_prior_evenly(self):
        library = np.arange(50.0)
        means, places = [], []
        for seed in range(20):
            torch.manual_seed(seed)
            drawn, states = counterfactual.prior_cells(64, 5, library)
            assert drawn.min() >= 0
            assert drawn.max() < 50
            means.append(states.square().mean(0))  # of which the expectation is one
            places.append(library[drawn].mean())
        # Of independent cells: sqrt(2 / 64) = 0.18, and 14.4 / sqrt(64) = 1.8.
        assert torch.stack(means).std(0).max() < 0.09
        assert torch.stack(means).mean(0).sub(1).abs().max() < 0.05
        assert np.std(places) < 0.6

    def test_draws_are_about_their_expectation(self, fitted):
        asked = Conditions.from_request(["P001"], fitted.perturbation_names)
        draws = fitted.counterfactual(seed=3).draw(6, asked)
        effects = fitted.module.effects
        expected = effects.to_network(effects.moments(draws.rows)[0])
        torch.testing.assert_close(draws.effects.mean(0), expected, atol=1e-5, rtol=1e-5)
        alone = [fitted.module.sample_globals(1, draws.rows).effects for _ in range(2_000)]
        drawn = [fitted.counterfactual(seed=s).draw(6, asked).effects for s in range(300)]
        spread = torch.cat(drawn).std(0) * (6 / 5) ** 0.5
        torch.testing.assert_close(spread, torch.cat(alone).std(0), atol=0.02, rtol=0.15)

    def test_effects_differ_little_between_seeds(self, fitted):
        effects = [
            fitted.get_average_treatment_effect(["P001"], n_samples=5, seed=seed)
            for seed in range(5)
        ]
        noise = np.std([effect.X for effect in effects], axis=0, ddof=1)
        spread = np.mean([effect.layers["std"] for effect in effects], axis=0)
        # Five independent draws alone would give sqrt(1 / 5) = 0.45.
        assert np.sqrt((noise**2).mean() / (spread**2).mean()) < 0.3
