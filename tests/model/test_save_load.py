from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import scvi

from scvi_sams import SAMSVAE, ScreenError, UnknownPerturbationError

from .conftest import QUIET, SETUP, SIZE, add_covariates, fit, small_screen

CONDITIONS = ["P001", "P001+P006"]

_ELSEWHERE = """
import sys
import numpy as np
import scvi
from scvi_sams import SAMSVAE

folder, target = sys.argv[1:]
model = SAMSVAE.load(folder, adata=False, accelerator="cpu")
scvi.settings.seed = 5
cells = model.predict(["P001", "P001+P006"], n_samples=4)
np.savez(target, counts=cells.X.toarray(), shift=model.get_perturbation_shift(["P001+P006"]))
"""


def _predict(model):
    scvi.settings.seed = 5
    return model.predict(CONDITIONS, n_samples=4).X.toarray()


def _load(folder, adata):
    return SAMSVAE.load(str(folder), adata, accelerator="cpu")


@pytest.fixture
def saved(any_fitted, tmp_path):
    any_fitted.save(str(tmp_path / "model"))
    return any_fitted, tmp_path / "model"


class TestRoundTrip:
    def test_with_adata(self, saved):
        model, folder = saved
        loaded = _load(folder, model.adata.copy())
        np.testing.assert_array_equal(_predict(loaded), _predict(model))
        for method in ("get_latent_representation", "get_perturbation_mask"):
            np.testing.assert_array_equal(getattr(loaded, method)(), getattr(model, method)())
        scvi.settings.seed = 1
        expected = model.get_iwelbo(n_particles=3)
        scvi.settings.seed = 1
        assert loaded.get_iwelbo(n_particles=3) == pytest.approx(expected, rel=1e-6)

    def test_without_adata(self, saved):
        model, folder = saved
        loaded = _load(folder, False)
        assert loaded.adata is None
        np.testing.assert_array_equal(_predict(loaded), _predict(model))
        scvi.settings.seed = 2
        expected = model.get_average_treatment_effect(n_samples=3, n_cells=4).X
        scvi.settings.seed = 2
        found = loaded.get_average_treatment_effect(n_samples=3, n_cells=4).X
        np.testing.assert_array_equal(found, expected)
        assert loaded.perturbation_names == model.perturbation_names

    def test_without_adata_cells_must_be_given(self, saved):
        model, folder = saved
        loaded = _load(folder, False)
        with pytest.raises(ScreenError, match=r"basal='prior'"):
            loaded.predict(CONDITIONS, basal="control")
        with pytest.raises(ScreenError, match=r"basal='prior'"):
            loaded.predict(CONDITIONS, basal=[1, 2])
        query = model.adata[:60].copy()
        assert loaded.predict("P001", basal=query).n_obs == 60

    def test_with_its_own_adata(self, fitted, tmp_path):
        fitted.save(str(tmp_path / "model"), save_anndata=True)
        loaded = _load(tmp_path / "model", None)
        assert loaded.adata is not fitted.adata
        np.testing.assert_array_equal(_predict(loaded), _predict(fitted))

    def test_another_process(self, saved, tmp_path):
        model, folder = saved
        target = tmp_path / "elsewhere.npz"
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _ELSEWHERE, str(folder), str(target)],
            check=True,
            timeout=120,
            capture_output=True,
        )
        with np.load(target) as elsewhere:
            np.testing.assert_array_equal(elsewhere["counts"], _predict(model))
            shift = model.get_perturbation_shift(["P001+P006"])
            np.testing.assert_array_equal(elsewhere["shift"], shift)

    def test_two_models(self, fitted, fitted_covariates, tmp_path):
        models = {"a": fitted, "b": fitted_covariates}
        for name, model in models.items():
            model.save(str(tmp_path / name))
        loaded = {name: _load(tmp_path / name, False) for name in models}
        for name, model in models.items():
            np.testing.assert_array_equal(_predict(loaded[name]), _predict(model))

    def test_does_not_overwrite_unasked(self, saved):
        model, folder = saved
        with pytest.raises(ValueError, match="already exists"):
            model.save(str(folder))
        model.save(str(folder), overwrite=True)

    def test_trains_on(self, saved):
        model, folder = saved
        loaded = _load(folder, model.adata.copy())
        before = loaded.get_perturbation_effect()
        loaded.train(max_epochs=1, plan_kwargs={"global_update_every": 2}, **QUIET)
        assert (loaded.get_perturbation_effect() != before).any(axis=None)
        assert np.isfinite(loaded.get_perturbation_effect()).all(axis=None)


class TestOtherScreens:
    def test_permuted_dosage_columns(self, tmp_path):
        adata = small_screen()
        names = [f"P{number:03d}" for number in range(1, 7)]
        parts = adata.obs["perturbation"].str.split("+", regex=False)
        dosage = np.array([[float(name in part) for name in names] for part in parts])
        adata.obsm["doses"] = dosage
        adata.uns["guides"] = names
        SAMSVAE.setup_anndata(
            adata, "counts", dosage_key="doses", perturbation_names_uns_key="guides"
        )
        model = fit(adata, max_epochs=2)
        model.save(str(tmp_path / "model"))

        order = [3, 1, 0, 5, 4, 2]
        permuted = small_screen()
        permuted.obsm["doses"] = dosage[:, order]
        permuted.uns["guides"] = [names[column] for column in order]
        loaded = _load(tmp_path / "model", permuted)
        assert loaded.perturbation_names == names
        np.testing.assert_array_equal(
            loaded.get_latent_representation(), model.get_latent_representation()
        )

    def test_fewer_genes(self, fitted, tmp_path):
        fitted.save(str(tmp_path / "model"))
        with (
            pytest.warns(UserWarning, match="var_names"),
            pytest.raises(ValueError, match="(?i)number of vars"),
        ):
            _load(tmp_path / "model", fitted.adata[:, :50].copy())

    def test_permuted_genes(self, fitted, tmp_path):
        fitted.save(str(tmp_path / "model"))
        with pytest.warns(UserWarning, match="var_names"):
            _load(tmp_path / "model", fitted.adata[:, ::-1].copy())

    def test_unknown_perturbation(self, fitted, tmp_path):
        fitted.save(str(tmp_path / "model"))
        other = small_screen()
        other.obs["perturbation"] = other.obs["perturbation"].str.replace("P003", "P099")
        with pytest.raises(UnknownPerturbationError, match="P099"):
            _load(tmp_path / "model", other)

    def test_unknown_batch(self, fitted_covariates, tmp_path):
        fitted_covariates.save(str(tmp_path / "model"))
        other = add_covariates(small_screen())
        other.obs["replicate"] = other.obs["replicate"].str.replace("_2", "_7")
        with pytest.raises(ValueError, match="replicate_7"):
            _load(tmp_path / "model", other)


class TestUntrained:
    def test_load(self, screen, tmp_path):
        SAMSVAE.setup_anndata(screen, **SETUP)
        SAMSVAE(screen, **SIZE).save(str(tmp_path / "model"))
        loaded = _load(tmp_path / "model", screen)
        assert not loaded.is_trained
        with pytest.raises(RuntimeError, match="train"):
            loaded.predict(CONDITIONS)
        loaded.train(max_epochs=1, **QUIET)
        assert loaded.predict(CONDITIONS, n_samples=2).n_obs == 4

    def test_arguments_are_kept(self, screen, tmp_path):
        SAMSVAE.setup_anndata(screen, **SETUP)
        model = SAMSVAE(
            screen,
            n_latent=5,
            n_hidden=16,
            n_layers=2,
            global_inference="gradient",
            basal_posterior="residual",
            mask_prior=0.01,
            mask_evidence_cells=None,
        )
        model.save(str(tmp_path / "model"))
        loaded = _load(tmp_path / "model", False)
        assert loaded.module.closed_form is None
        assert repr(loaded) == repr(model)


def test_repr(fitted, screen, capsys):
    SAMSVAE.setup_anndata(screen, **SETUP)
    for model, status in ((fitted, "Trained"), (SAMSVAE(screen, **SIZE), "Not Trained")):
        capsys.readouterr()
        text = repr(model) + capsys.readouterr().out
        text = " ".join(text.split())
        assert "SAMSVAE with 6 perturbations" in text
        assert "n_latent=6" in text
        assert f"Training status: {status}" in text
