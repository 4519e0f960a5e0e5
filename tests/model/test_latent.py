from __future__ import annotations

import numpy as np
import pytest

from scvi_sams import SAMSVAE, ScreenError, UnknownPerturbationError

from .conftest import QUIET, SETUP, SIZE

LATENTS = [f"latent_{number}" for number in range(6)]
PERTURBATIONS = [f"P{number:03d}" for number in range(1, 7)]


class TestCells:
    def test_full_is_basal_and_perturbation(self, any_fitted):
        full, basal, perturbation = (
            any_fitted.get_latent_representation(representation=name)
            for name in ("full", "basal", "perturbation")
        )
        assert full.shape == (600, 6)
        np.testing.assert_allclose(full, basal + perturbation, atol=1e-5)
        assert np.abs(perturbation).max() > 0.1
        assert not np.allclose(basal, full)

    def test_perturbation_is_the_shift_of_the_label(self, any_fitted):
        labels = any_fitted.adata.obs["perturbation"].astype(str)
        expected = any_fitted.get_perturbation_shift(sorted(set(labels))).loc[labels]
        found = any_fitted.get_latent_representation(representation="perturbation")
        np.testing.assert_allclose(found, expected, atol=1e-5)
        np.testing.assert_array_equal(found[labels == "control"], 0)

    @pytest.mark.parametrize("representation", ["full", "basal", "perturbation"])
    def test_order_of_indices(self, any_fitted, representation):
        indices = [17, 3, 512, 40]
        all_cells = any_fitted.get_latent_representation(representation=representation)
        some = any_fitted.get_latent_representation(
            indices=indices, representation=representation, batch_size=3
        )
        np.testing.assert_allclose(some, all_cells[indices], atol=1e-5)

    def test_another_adata(self, fitted):
        query = fitted.adata[50:60].copy()
        np.testing.assert_allclose(
            fitted.get_latent_representation(query),
            fitted.get_latent_representation(indices=np.arange(50, 60)),
            atol=1e-5,
        )

    def test_dataloader(self, fitted):
        loader = fitted._make_data_loader(fitted.adata, indices=[5, 6, 7])
        np.testing.assert_allclose(
            fitted.get_latent_representation(dataloader=loader),
            fitted.get_latent_representation(indices=[5, 6, 7]),
            atol=1e-5,
        )

    def test_draws_have_the_moments_of_the_posterior(self, fitted):
        mean, variance = fitted.get_latent_representation(indices=[3], return_dist=True)
        np.testing.assert_array_equal(mean, fitted.get_latent_representation(indices=[3]))
        draws = fitted.get_latent_representation(indices=np.full(4000, 3), give_mean=False)
        error = np.sqrt(variance / 4000)
        assert (np.abs(draws.mean(0) - mean) < 5 * error).all()
        np.testing.assert_allclose(draws.var(0), variance[0], rtol=0.15)

    def test_errors(self, fitted):
        with pytest.raises(ValueError, match="representation='shift' cannot be used"):
            fitted.get_latent_representation(representation="shift")
        for arguments in ({"return_dist": True}, {"give_mean": False}):
            with pytest.raises(ValueError, match="representation='full'"):
                fitted.get_latent_representation(representation="basal", **arguments)


class TestPerturbations:
    def test_names(self, any_fitted):
        for table in (any_fitted.get_perturbation_mask(), any_fitted.get_perturbation_effect()):
            assert table.index.tolist() == PERTURBATIONS == any_fitted.perturbation_names
            assert table.columns.tolist() == LATENTS

    def test_mask_is_a_probability_that_differs(self, fitted):
        mask = fitted.get_perturbation_mask().to_numpy()
        assert mask.min() >= 0
        assert mask.max() <= 1
        assert (mask > 0.5).any()
        assert (mask < 0.1).any()

    def test_effect_is_mask_times_embedding(self, fitted):
        effects = fitted.module.effects
        slab = effects.slab_mean.detach().numpy()
        expected = fitted.get_perturbation_mask() * slab
        np.testing.assert_allclose(fitted.get_perturbation_effect(), expected, rtol=1e-6)

    def test_shift_adds_the_background(self, fitted):
        """By the posterior itself, without what reported masks are charged."""
        q = fitted.module.effects.parameters_of()
        on = q.mask_logits.sigmoid()
        expected = (on * q.slab_mean + (1 - on) * q.spike_mean).numpy()
        shift = fitted.get_perturbation_shift(PERTURBATIONS)
        np.testing.assert_allclose(shift, expected, atol=1e-6)

    def test_before_the_masks_are_on(self, screen):
        SAMSVAE.setup_anndata(screen, **SETUP)
        model = SAMSVAE(screen, **SIZE)
        model.train(max_epochs=1, plan_kwargs={"mask_warmup_fraction": 2.0}, **QUIET)
        assert (model.get_perturbation_mask() == 0).all(axis=None)
        assert (model.get_perturbation_effect() == 0).all(axis=None)
        assert (model.get_perturbation_shift(["P001"]) == 0).all(axis=None)


class TestShift:
    def test_adds_over_a_combination(self, any_fitted):
        shift = any_fitted.get_perturbation_shift
        singles = shift(["P001", "P004", "P006"]).sum()
        np.testing.assert_allclose(shift("P006+P001+P004").iloc[0], singles, atol=1e-6)

    def test_linear_in_dose(self, any_fitted):
        shift = any_fitted.get_perturbation_shift(
            [{"P002": 1.0}, {"P002": 0.25}, {"P002": 3.0}, {}]
        ).to_numpy()
        np.testing.assert_allclose(shift[1:], [0.25 * shift[0], 3 * shift[0], 0 * shift[0]])

    def test_ways_to_write_conditions(self, any_fitted):
        by_label = any_fitted.get_perturbation_shift(["control", "P003", "P001+P002"])
        assert by_label.index.tolist() == ["control", "P003", "P001+P002"]
        by_dict = any_fitted.get_perturbation_shift([{}, {"P003": 1}, {"P001": 1, "P002": 1}])
        matrix = np.array([[0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]])
        by_matrix = any_fitted.get_perturbation_shift(matrix)
        np.testing.assert_array_equal(by_label, by_dict)
        np.testing.assert_array_equal(by_label, by_matrix)

    @pytest.mark.parametrize("condition", ["P0O1", "P001+P0O1", {"P0O1": 1.0}])
    def test_unknown_lists_the_nearest(self, fitted, condition):
        with pytest.raises(UnknownPerturbationError, match=r"P0O1.*P001"):
            fitted.get_perturbation_shift([condition])

    @pytest.mark.parametrize("dose", [-1.0, np.nan, np.inf])
    def test_bad_dose(self, fitted, dose):
        with pytest.raises(ScreenError, match="P001"):
            fitted.get_perturbation_shift([{"P001": dose}])
