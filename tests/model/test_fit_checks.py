"""A fit that was too short, or too free, says so; one that is as it should be says nothing."""

import warnings

import numpy as np
import pytest
import scvi
import torch

from scvi_sams import SAMSVAE, FitWarning
from scvi_sams.datasets import simulated_screen
from scvi_sams.model.fit_checks import (
    all_on_one_latent,
    still_falls,
    validation_rose,
    warn_of_fit,
)

LABELS = {"perturbation_key": "perturbation", "control": "control"}
QUIET = {"accelerator": "cpu", "enable_progress_bar": False}


def _shallow_model(n_cells=800, library_size=150.0, **kwargs):
    screen = simulated_screen(
        n_cells,
        n_genes=400,
        n_perturbations=6,
        n_pairs=0,
        library_size=library_size,
        effect_size=1.5,
        inactive_fraction=0.3,
        n_batches=1,
        seed=0,
    )
    SAMSVAE.setup_anndata(screen, **LABELS)
    scvi.settings.seed = 0
    return SAMSVAE(screen, **kwargs)


def _messages(model, **kwargs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.train(**(QUIET | kwargs))
    return [str(w.message) for w in caught if issubclass(w.category, FitWarning)]


class TestTooShort:
    def test_few_epochs(self):
        messages = _messages(_shallow_model(), max_epochs=4, train_size=1.0)
        assert any("still falling" in m and "max_epochs=8" in m for m in messages)

    def test_one_latent_that_all_share(self):
        model = _shallow_model()
        model.train(max_epochs=1, train_size=1.0, **QUIET)
        effects = model.module.effects
        with torch.no_grad():
            effects.mask_logits.fill_(-10.0)
            effects.mask_logits[:, 2] = 10.0
            effects.selection_penalty.zero_()
        with pytest.warns(FitWarning, match=r"6 of 6 perturbations move one latent.*max_epochs=2"):
            warn_of_fit(model)

    @pytest.mark.parametrize(
        ("n_on", "n_perturbations", "expected"),
        [(2, 2, False), (3, 6, True), (3, 7, False), (0, 3, False)],
    )
    def test_how_many_must_share(self, n_on, n_perturbations, expected):
        is_on = np.zeros((n_perturbations, 4), dtype=bool)
        is_on[:n_on, 1] = True
        assert all_on_one_latent(is_on) is expected
        is_on[-1, 3] = True
        assert not all_on_one_latent(is_on)

    @pytest.mark.parametrize(("rate", "expected"), [(0.5, True), (2.0, True), (8.0, False)])
    def test_exponential_fall(self, rate, expected):
        # Of exp(-rate t), 1 / (1 + exp(rate / 2)) of the fall is in the second half.
        curve = 100 * np.exp(-rate * np.linspace(0, 1, 41))
        assert still_falls(curve) is expected
        assert not still_falls(curve[::-1])
        assert not still_falls(np.append(curve, np.nan))


class TestByHeart:
    def test_wide_networks_on_shallow_cells(self):
        model = _shallow_model(600, library_size=80.0, n_hidden=400)
        settings = {"train_size": 0.7, "check_val_every_n_epoch": 1}
        (message,) = _messages(model, plan_kwargs={"weight_precision": 0.0}, **settings)
        assert "one rate a gene" in message
        assert "max_epochs=40" in message
        assert "n_hidden=200" in message

    def test_the_prior_of_weights_is_why_the_default_does_not(self):
        model = _shallow_model(600, library_size=80.0, n_hidden=400)
        assert _messages(model, train_size=0.7, check_val_every_n_epoch=1) == []

    def test_the_default_says_nothing(self):
        assert _messages(_shallow_model(4_000), max_epochs=40, check_val_every_n_epoch=1) == []

    def test_the_look_at_validation_cells_moves_no_random_numbers(self, monkeypatch):
        def draw():
            _shallow_model().train(max_epochs=1, **QUIET)
            return torch.rand(3)

        looked = draw()
        monkeypatch.setattr("scvi_sams.model.samsvae.warn_of_fit", lambda model: None)
        assert torch.equal(looked, draw())

    def test_a_rise_is_held_against_what_training_cells_gained(self):
        training, falling = np.linspace(100, 80, 40), np.linspace(100, 90, 40)
        assert not validation_rose(training, falling)
        assert validation_rose(training, np.r_[falling[::2], np.linspace(90, 120, 20)])
        assert not validation_rose(training[:20], np.linspace(90, 120, 20))

    def test_a_curve_that_only_jumps_did_not_rise(self):
        rng = np.random.default_rng(0)
        found = [validation_rose(np.full(80, 90.0), rng.normal(95, 1, 80)) for _ in range(50)]
        # The last tenth is compared with the best of ten, two standard errors apart.
        assert np.mean(found) < 0.5
