from __future__ import annotations

import numpy as np
import pytest
import scvi
import torch

from scvi_sams.model import read_outs

CELLS = np.arange(0, 200)


def _mean_and_error(method, n_repeats, **kwargs):
    values = []
    for seed in range(n_repeats):
        scvi.settings.seed = seed
        values.append(method(indices=CELLS, **kwargs))
    return np.mean(values), np.std(values, ddof=1) / np.sqrt(n_repeats)


class TestImportanceWeighted:
    def test_rises_with_particles(self, any_fitted):
        bounds = [
            _mean_and_error(any_fitted.get_iwelbo, 5, n_particles=n_particles)
            for n_particles in (1, 10, 100)
        ]
        for (low, low_error), (high, high_error) in zip(bounds, bounds[1:], strict=False):
            assert high - low > 3 * np.hypot(low_error, high_error)

    def test_one_particle_is_the_elbo(self, any_fitted):
        one, one_error = _mean_and_error(any_fitted.get_iwelbo, 100, n_particles=1)
        elbo, error = _mean_and_error(any_fitted.get_elbo, 20, n_samples=10, include_global=False)
        assert abs(one - elbo) < 4 * np.hypot(one_error, error)
        assert np.hypot(one_error, error) < 1  # of some 400 nats

    @pytest.mark.parametrize("limit", ["MAX_WEIGHT_ELEMENTS", "MAX_EFFECT_ELEMENTS"])
    def test_chunks(self, fitted, monkeypatch, limit):
        whole, whole_error = _mean_and_error(fitted.get_iwelbo, 5, n_particles=10)
        monkeypatch.setattr(read_outs, limit, 100)
        chunked, error = _mean_and_error(fitted.get_iwelbo, 5, n_particles=10, batch_size=50)
        assert abs(whole - chunked) < 4 * np.hypot(whole_error, error)

    def test_draws_are_shared_by_all_cells(self, fitted, monkeypatch):
        """One draw of the effects a particle, whatever the minibatches."""
        drawn = []
        sample = fitted.module.effects.sample
        monkeypatch.setattr(
            fitted.module.effects, "sample", lambda n, rows: drawn.append(n) or sample(n, rows)
        )
        fitted.get_iwelbo(indices=CELLS, n_particles=3, batch_size=20)
        assert drawn == [3]


class TestElbo:
    def test_global_term(self, any_fitted):
        scvi.settings.seed = 1
        local = any_fitted.get_elbo(indices=CELLS, include_global=False)
        scvi.settings.seed = 1
        full = any_fitted.get_elbo(indices=CELLS)
        divergence = sum(any_fitted.module.effects.kl().values()).item()
        assert divergence > 1
        n_cells = len(any_fitted.train_indices)
        assert local - full == pytest.approx(divergence / n_cells, rel=1e-3)

    def test_agrees_with_training(self, any_fitted):
        """The bound is the one that training reports, noise aside."""
        history = -any_fitted.history["elbo_validation"].iloc[-1].item()
        elbo = any_fitted.get_elbo(indices=any_fitted.validation_indices, n_samples=50)
        assert elbo == pytest.approx(history, rel=0.02)

    def test_divergence_of_cells(self, any_fitted):
        """The bound by draws of all latents against the exact divergence of the basal state."""
        (tensors,) = any_fitted._make_data_loader(
            any_fitted.adata, indices=CELLS, batch_size=len(CELLS)
        )
        exact = []
        with torch.inference_mode():
            for _ in range(30):
                *_, terms = any_fitted.module(tensors)
                exact.append(-terms.loss.item())
        error = np.std(exact, ddof=1) / np.sqrt(30)
        drawn, drawn_error = _mean_and_error(
            any_fitted.get_elbo, 20, n_samples=10, include_global=False
        )
        assert abs(np.mean(exact) - drawn) < 4 * np.hypot(error, drawn_error) + 0.05


class TestBoth:
    @pytest.fixture(params=["get_iwelbo", "get_elbo"])
    def method(self, request, any_fitted):
        return getattr(any_fitted, request.param)

    def test_mean_of_cells(self, method):
        scvi.settings.seed = 3
        cells = method(indices=CELLS, return_mean=False)
        scvi.settings.seed = 3
        assert cells.shape == CELLS.shape
        assert method(indices=CELLS) == pytest.approx(cells.mean(), rel=1e-5)

    def test_order_of_indices(self, method):
        """Bounds of cells vary far more from cell to cell than from draw to draw."""
        bounds = method(indices=CELLS, return_mean=False)
        order = np.random.default_rng(0).permutation(CELLS)
        shuffled = method(indices=order, return_mean=False, batch_size=30)
        assert np.corrcoef(bounds[order], shuffled)[0, 1] > 0.95
        assert abs(np.corrcoef(bounds, shuffled)[0, 1]) < 0.4

    def test_seed(self, method):
        scvi.settings.seed = 4
        first = method(indices=CELLS, return_mean=False)
        other = method(indices=CELLS, return_mean=False)
        scvi.settings.seed = 4
        np.testing.assert_array_equal(method(indices=CELLS, return_mean=False), first)
        assert not np.array_equal(first, other)

    def test_no_particles(self, any_fitted):
        with pytest.raises(ValueError, match="n_particles=0"):
            any_fitted.get_iwelbo(n_particles=0)
        with pytest.raises(ValueError, match="n_samples=0"):
            any_fitted.get_elbo(n_samples=0)
