"""Other doors of scvi-tools into training: configs of plans, data modules without an AnnData."""

from __future__ import annotations

import numpy as np
import pytest
import scvi
from scvi.train import TrainingPlanConfig

import scvi_sams
from scvi_sams import SAMSVAE, ScreenError
from scvi_sams.model.training import changed_settings
from scvi_sams.train import SAMSDataSplitter

QUIET = {"enable_progress_bar": False, "accelerator": "cpu"}


@pytest.fixture(scope="module")
def screen():
    adata = scvi_sams.datasets.simulated_screen(n_cells=400, n_genes=40, n_perturbations=5)
    SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control")
    return adata


def fit(screen, **arguments) -> SAMSVAE:
    scvi.settings.seed = 0
    model = SAMSVAE(screen, n_latent=3, n_hidden=8)
    model.train(max_epochs=2, **QUIET, **arguments)
    return model


class TestPlanConfig:
    def test_of_scvi_tools_changes_nothing(self, screen):
        losses = [
            fit(screen, plan_config=config).history["train_loss"].to_numpy(float)
            for config in (None, TrainingPlanConfig(), {})
        ]
        np.testing.assert_array_equal(losses[0], losses[1])
        np.testing.assert_array_equal(losses[0], losses[2])

    def test_what_differs_from_its_defaults_is_meant(self):
        assert changed_settings(TrainingPlanConfig(lr=0.02, eps=1e-6)) == {"lr": 0.02, "eps": 1e-6}
        assert changed_settings({"lr": 1e-3}) == {"lr": 1e-3}

    def test_is_overruled_by_plan_kwargs(self, screen):
        given = fit(screen, plan_config=TrainingPlanConfig(lr=0.1), plan_kwargs={"lr": 2e-3})
        alone = fit(screen, plan_kwargs={"lr": 2e-3})
        for ours, theirs in zip(given.module.parameters(), alone.module.parameters(), strict=True):
            np.testing.assert_array_equal(ours.detach(), theirs.detach())


@pytest.fixture(scope="module")
def streamed(screen):
    """A model that never had an AnnData, trained on minibatches alone."""
    of_screen = SAMSVAE(screen, n_latent=3, n_hidden=8)
    scvi.settings.seed = 0
    model = SAMSVAE(registry=of_screen.registry, n_latent=3, n_hidden=8)
    cells = SAMSDataSplitter(of_screen.adata_manager, train_size=0.9, batch_size=64)
    model.train(max_epochs=2, datamodule=cells, **QUIET)
    return model


class TestDataModule:
    def test_trains_and_predicts(self, streamed):
        assert streamed.adata is None
        assert np.isfinite(streamed.history["train_loss"].to_numpy(float)).all()
        effect = streamed.get_average_treatment_effect(["P001"], n_samples=2, n_cells=10)
        assert np.isfinite(effect.X).all()
        assert streamed.predict(["P001+P002"], n_samples=4).n_obs == 4

    def test_reference_cells_are_controls(self, streamed, screen):
        library = streamed.reference_cells_["size_factor"].ravel()
        is_control = screen.obs["perturbation"] == "control"
        counts = np.asarray(screen.layers["counts"].sum(1)).ravel()
        assert set(library) <= set(counts[is_control])
        assert 0 < len(library) <= is_control.sum()

    def test_number_of_epochs_must_be_given(self, screen):
        of_screen = SAMSVAE(screen, n_latent=3, n_hidden=8)
        model = SAMSVAE(registry=of_screen.registry, n_latent=3, n_hidden=8)
        with pytest.raises(ScreenError, match="give max_epochs"):
            model.train(datamodule=SAMSDataSplitter(of_screen.adata_manager, train_size=0.9))
