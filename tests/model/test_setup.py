from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import scvi_sams
from scvi_sams import SAMSVAE, ScreenError
from scvi_sams.data.field import registered_dosage

from .conftest import QUIET, SETUP, SIZE, add_covariates, fit


def _dosage(adata) -> pd.DataFrame:
    names = [f"P{number:03d}" for number in range(1, 7)]
    labels = adata.obs["perturbation"].str.split("+", regex=False)
    doses = [[float(name in parts) for name in names] for parts in labels]
    return pd.DataFrame(doses, columns=names, index=adata.obs_names)


def _inputs(adata):
    model = SAMSVAE(adata, **SIZE)
    return model.perturbation_names, registered_dosage(model.adata_manager).toarray()


class TestInputs:
    """However the doses are given, the model sees the same."""

    @pytest.mark.parametrize(
        "storage",
        [
            np.asarray,
            sparse.csr_matrix,
            sparse.csc_matrix,
            sparse.csr_array,
            pd.DataFrame,
        ],
    )
    def test_matrix_as_labels(self, screen, storage):
        dosage = _dosage(screen)
        by_matrix = screen.copy()
        SAMSVAE.setup_anndata(screen, **SETUP)
        by_matrix.obsm["doses"] = storage(dosage)
        names_key = None
        if storage is not pd.DataFrame:
            names_key = "guides"
            by_matrix.uns["guides"] = np.array(dosage.columns)
        SAMSVAE.setup_anndata(
            by_matrix, "counts", dosage_key="doses", perturbation_names_uns_key=names_key
        )
        names, of_labels = _inputs(screen)
        assert names == list(dosage.columns)
        np.testing.assert_array_equal(of_labels, dosage)
        names, of_matrix = _inputs(by_matrix)
        assert names == list(dosage.columns)
        np.testing.assert_array_equal(of_matrix, of_labels)

    def test_doses(self, screen):
        n_parts = screen.obs["perturbation"].str.count(r"\+") + 1
        screen.obs["dose"] = ["0.5" if n == 1 else "0.5+2" for n in n_parts]
        SAMSVAE.setup_anndata(screen, **SETUP, dosage_key="dose")
        _, doses = _inputs(screen)
        expected = _dosage(screen).to_numpy() * 0.5
        for cell in np.flatnonzero(n_parts == 2):
            expected[cell, np.flatnonzero(expected[cell])[1]] = 2
        np.testing.assert_array_equal(doses, expected)

    def test_two_screens_in_one_process(self, screen):
        other = scvi_sams.datasets.simulated_screen(
            n_cells=200, n_genes=30, n_perturbations=2, n_pairs=0, n_latent=2, seed=1
        )
        other.obs["perturbation"] = other.obs["perturbation"].str.replace("P00", "Q")
        SAMSVAE.setup_anndata(screen, **SETUP)
        alone = fit(screen, max_epochs=2)
        expected = alone.get_latent_representation()

        SAMSVAE.setup_anndata(screen, **SETUP)
        SAMSVAE.setup_anndata(other, **SETUP, batch_key="replicate")
        first, second = fit(screen, max_epochs=2), fit(other, max_epochs=2)
        assert first.perturbation_names == [f"P{number:03d}" for number in range(1, 7)]
        assert second.perturbation_names == ["Q1", "Q2"]
        assert second.get_latent_representation().shape == (200, 6)
        np.testing.assert_array_equal(first.get_latent_representation(), expected)

    def test_leaves_counts_and_labels(self, screen):
        before = screen.copy()
        SAMSVAE.setup_anndata(screen, **SETUP)
        fit(screen, max_epochs=1)
        assert (screen.layers["counts"] != before.layers["counts"]).nnz == 0
        pd.testing.assert_frame_equal(screen.obs[before.obs.columns], before.obs)


class TestRefused:
    """Bad input ends with an error that names the culprit."""

    @staticmethod
    def _refused(adata, message, **kwargs):
        with pytest.raises(ScreenError, match=message):
            SAMSVAE.setup_anndata(adata, **(SETUP | kwargs))

    def test_all_control(self, screen):
        screen.obs["perturbation"] = "control"
        self._refused(screen, "perturbation.*all control")

    def test_absent_control(self, screen):
        self._refused(screen, "'NT'.*control", control="NT")

    def test_absent_columns(self, screen):
        self._refused(screen, "'guide'.*perturbation", perturbation_key="guide")
        self._refused(screen, "'raw'.*counts", layer="raw")

    def test_view(self, screen):
        with pytest.raises(ValueError, match="copy"):
            SAMSVAE.setup_anndata(screen[:100], **SETUP)

    @pytest.mark.parametrize("value", [0.5, -1.0, np.nan])
    def test_no_counts(self, screen, value):
        counts = screen.layers["counts"].toarray().astype(np.float32)
        counts[7, 3] = value
        screen.layers["counts"] = counts
        self._refused(screen, f"{screen.var_names[3]}.*{screen.obs_names[7]}")

    def test_empty_cells(self, screen):
        counts = screen.layers["counts"].toarray()
        counts[[4, 9]] = 0
        screen.layers["counts"] = counts
        self._refused(screen, f"{screen.obs_names[4]}.*{screen.obs_names[9]}")

    @pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, -3.0])
    def test_size_factor(self, screen, value):
        add_covariates(screen).obs.loc[screen.obs_names[5], "total"] = value
        self._refused(screen, screen.obs_names[5], size_factor_key="total")

    @pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
    def test_doses(self, screen, value):
        dosage = _dosage(screen)
        dosage.iloc[2, 4] = value
        screen.obsm["doses"] = dosage
        with pytest.raises(ScreenError, match="P005"):
            SAMSVAE.setup_anndata(screen, "counts", dosage_key="doses")

    def test_repeated_names(self, screen):
        dosage = _dosage(screen).rename(columns={"P002": "P001"})
        screen.obsm["doses"] = dosage.to_numpy()
        screen.uns["guides"] = list(dosage.columns)
        with pytest.raises(ScreenError, match="P001"):
            SAMSVAE.setup_anndata(
                screen, "counts", dosage_key="doses", perturbation_names_uns_key="guides"
            )


class TestWarned:
    def test_one_cell(self, screen):
        screen.obs["perturbation"] = screen.obs["perturbation"].astype(str)
        screen.obs.loc[screen.obs_names[0], "perturbation"] = "RARE"
        with pytest.warns(UserWarning, match="RARE"):
            SAMSVAE.setup_anndata(screen, **SETUP)
        model = fit(screen, max_epochs=2)
        assert np.isfinite(model.get_perturbation_effect().loc["RARE"]).all()

    def test_no_control(self, screen):
        perturbed = screen[screen.obs["perturbation"] != "control"].copy()
        with pytest.warns(UserWarning, match="(?i)no cell is a control"):
            SAMSVAE.setup_anndata(perturbed, **(SETUP | {"control": None}))
        model = fit(perturbed, max_epochs=2)
        assert model.predict(["P001"], n_samples=3).shape == (3, 80)
        with pytest.raises(ScreenError, match="basal='control'"):
            model.predict(["P001"], basal="control")

    def test_confounded(self, screen):
        screen.obs["replicate"] = np.where(
            screen.obs["perturbation"].str.contains("P003"), "replicate_2", "replicate_1"
        )
        with pytest.warns(UserWarning, match="P003"):
            SAMSVAE.setup_anndata(screen, **SETUP, batch_key="replicate")


class TestSmallScreens:
    def test_one_perturbation(self, screen):
        keep = screen.obs["perturbation"].isin(["control", "P001"])
        one = screen[keep].copy()
        SAMSVAE.setup_anndata(one, **SETUP)
        model = fit(one, max_epochs=4)
        assert model.get_perturbation_effect().index.tolist() == ["P001"]
        assert model.get_average_treatment_effect(n_samples=3, n_cells=5).shape == (1, 80)

    def test_untrained_model_says_so(self, screen):
        SAMSVAE.setup_anndata(screen, **SETUP)
        model = SAMSVAE(screen, **SIZE)
        for read_out in (
            model.get_latent_representation,
            model.get_perturbation_mask,
            model.get_perturbation_effect,
            model.get_elbo,
            model.get_iwelbo,
            model.get_average_treatment_effect,
        ):
            with pytest.raises(RuntimeError, match="train"):
                read_out()

    def test_trains_again_from_where_it_was(self, screen):
        SAMSVAE.setup_anndata(screen, **SETUP)
        model = fit(screen, max_epochs=3)
        model.train(max_epochs=2, **QUIET)
        assert len(model.history["elbo_train"]) == 5
