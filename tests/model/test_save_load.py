from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import weakref
import zipfile
from importlib.metadata import version

import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from scvi.model.base import BaseModelClass

from scvi_sams import CPAVAE, SAMSVAE, ScreenError, UnknownPerturbationError
from scvi_sams.cli import main

from .conftest import QUIET, SETUP, SIZE, add_covariates, fit, small_screen

faults = pytest.importorskip("benchmarks.faults", reason="run pytest as `python -m pytest`")

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


class TestContent:
    def test_plain_data(self, saved):
        """What torch reads without pickle is all there is."""
        model, folder = saved
        content = torch.load(folder / "model.pt", weights_only=True)
        record = content["scvi_sams"]
        assert record["format"] == 1
        for name in ("scvi-sams", "scvi-tools", "torch", "anndata"):
            assert record["versions"][name] == version(name)
        assert record["seed"] == scvi.settings.seed
        assert content["var_names"] == list(model.adata.var_names)
        history = content["attr_dict"]["history_"]["elbo_train"]["columns"]["elbo_train"]
        np.testing.assert_allclose(
            torch.as_tensor(history), model.history["elbo_train"]["elbo_train"].to_numpy(float)
        )

    def test_attributes_are_what_they_were(self, saved):
        model, folder = saved
        loaded = _load(folder, False)
        for name in ("history_", "reference_cells_"):
            for key, value in getattr(model, name).items():
                found = getattr(loaded, name)[key]
                assert type(found) is type(value)
                if isinstance(value, pd.DataFrame):
                    pd.testing.assert_frame_equal(found, value)
                else:
                    np.testing.assert_array_equal(found, value)
                    assert found.dtype == value.dtype
        for name in ("train_indices", "validation_indices", "test_indices"):
            np.testing.assert_array_equal(getattr(loaded, name), getattr(model, name))
        fields, expected = (m.registry["field_registries"] for m in (loaded, model))
        assert fields.keys() == expected.keys()
        for key in fields:
            assert repr(fields[key]) == repr(expected[key])
        assert loaded.init_params_ == model.init_params_

    @pytest.mark.parametrize("with_cells", [True, False])
    def test_scvi_tools_reads_it(self, saved, with_cells):
        model, folder = saved
        adata = model.adata.copy() if with_cells else False
        load = BaseModelClass.load.__func__
        loaded = load(SAMSVAE, str(folder), adata, accelerator="cpu")
        np.testing.assert_array_equal(_predict(loaded), _predict(model))
        if with_cells:
            np.testing.assert_array_equal(
                loaded.get_latent_representation(), model.get_latent_representation()
            )
            query = adata[:100].copy()
            query.obs["replicate"] = "replicate_9"  # new to the model that knows of batches
            assert SAMSVAE.load_query_data(query, loaded, accelerator="cpu").adata is query
        registry = BaseModelClass.load_registry(str(folder))
        assert registry["setup_args"] == model.registry["setup_args"]
        assert SAMSVAE.load_registry(folder)["setup_args"] == registry["setup_args"]
        SAMSVAE.view_setup_args(folder)

    def test_scvi_tools_files_are_read_if_trusted(self, fitted, tmp_path):
        BaseModelClass.save(fitted, str(tmp_path / "model"))
        with pytest.raises(ScreenError, match="trusted=True"):
            _load(tmp_path / "model", False)
        loaded = SAMSVAE.load(tmp_path / "model", False, accelerator="cpu", trusted=True)
        np.testing.assert_array_equal(_predict(loaded), _predict(fitted))

    def test_what_is_not_plain_is_told(self, fitted, tmp_path):
        model = copy.deepcopy(fitted)
        model.notes_ = {"made": pd.Timestamp("2024-01-01")}
        with pytest.warns(UserWarning, match="notes_/made"):
            model.save(tmp_path / "model")
        with pytest.raises(ScreenError, match="trusted=True"):
            _load(tmp_path / "model", False)
        loaded = SAMSVAE.load(tmp_path / "model", False, accelerator="cpu", trusted=True)
        assert loaded.notes_ == model.notes_

    def test_paths_and_prefixes(self, fitted, tmp_path):
        fitted.save(tmp_path / "model", prefix="best_")
        with pytest.raises(ScreenError, match=r"best_model\.pt.*`prefix`"):
            SAMSVAE.load(tmp_path / "model", False)
        loaded = SAMSVAE.load(tmp_path / "model", False, accelerator="cpu", prefix="best_")
        np.testing.assert_array_equal(_predict(loaded), _predict(fitted))
        query = SAMSVAE.load_query_data(
            small_screen(), tmp_path / "model", prefix="best_", accelerator="cpu"
        )
        assert query.perturbation_names == fitted.perturbation_names

    def test_reading_draws_no_random_numbers(self, saved):
        model, folder = saved
        before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        _load(folder, model.adata.copy())
        assert torch.equal(torch.get_rng_state(), before[0])
        np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


class _Touches:
    """A pickle that touches a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def crafted(fitted, tmp_path):
    """A folder as `fit` writes it, with a model that runs code when read, and what it touches."""
    folder, touched = tmp_path / "crafted" / "model", tmp_path / "touched"
    fitted.save(folder, save_anndata=True)
    content = torch.load(folder / "model.pt", weights_only=True)
    content["attr_dict"]["history_"] = _Touches(touched)
    torch.save(content, folder / "model.pt")
    torch.load(folder / "model.pt", weights_only=False)
    assert touched.exists()
    touched.unlink()
    return folder, touched


class TestCode:
    @pytest.mark.parametrize(
        "read",
        [
            lambda folder: SAMSVAE.load(folder, adata=False),
            lambda folder: SAMSVAE.load(folder),
            lambda folder: SAMSVAE.load_query_data(small_screen(), folder),
            SAMSVAE.load_registry,
            SAMSVAE.view_setup_args,
        ],
        ids=["load", "load with cells", "load_query_data", "load_registry", "view_setup_args"],
    )
    def test_is_not_run(self, crafted, read):
        folder, touched = crafted
        with pytest.raises(ScreenError, match=r"model\.pt holds Python objects.*trusted=True"):
            read(folder)
        assert not touched.exists()

    def test_is_not_run_by_the_command_line(self, crafted, tmp_path, capsys):
        folder, touched = crafted
        output = tmp_path / "cells.h5ad"
        assert (
            main(["predict", str(folder.parent), "--conditions", "P001", "-o", str(output)]) == 1
        )
        assert "holds Python objects" in capsys.readouterr().err
        assert not touched.exists()
        assert not output.exists()

    def test_is_not_run_by_the_hub(self, crafted):
        hub = pytest.importorskip("huggingface_hub", reason="scvi.hub needs huggingface_hub")
        from scvi.hub import HubMetadata, HubModel

        folder, touched = crafted
        metadata = HubMetadata(
            scvi.__version__, version("anndata"), "SAMSVAE", model_parent_module="scvi_sams"
        )
        card = hub.ModelCard("---\nlicense: mit\n---\nA card.")
        model = HubModel(str(folder), metadata=metadata, model_card=card)
        with pytest.raises(ScreenError, match="holds Python objects"):
            _ = model.model
        assert not touched.exists()

    def test_metadata_of_the_hub_need_no_reader_of_scvi_tools(self, fitted, tmp_path):
        """Theirs unpickles, which the user guide says, and finds what can be said without."""
        pytest.importorskip("huggingface_hub", reason="scvi.hub needs huggingface_hub")
        from scvi.hub import HubMetadata

        fitted.save(tmp_path / "model")
        said = HubMetadata(scvi.__version__, "0", "SAMSVAE", model_parent_module="scvi_sams")
        read = HubMetadata.from_dir(
            str(tmp_path / "model"), anndata_version="0", model_parent_module="scvi_sams"
        )
        assert said == read
        registry = SAMSVAE.load_registry(tmp_path / "model")
        assert registry["scvi_version"] == scvi.__version__
        assert registry["model_name"] == "SAMSVAE"

    def test_is_run_if_trusted(self, crafted):
        folder, touched = crafted
        SAMSVAE.load(folder, adata=False, accelerator="cpu", trusted=True)
        assert touched.exists()


class TestRefusals:
    def _change(self, folder, change):
        content = torch.load(folder / "model.pt", weights_only=True)
        change(content)
        torch.save(content, folder / "model.pt")

    def test_weights_that_are_not_finite(self, fitted, tmp_path):
        fitted.save(tmp_path / "model")
        self._change(tmp_path / "model", lambda c: c["model_state_dict"]["px_r"][:2].fill_(np.nan))
        with pytest.raises(ScreenError, match=r"model\.pt has 2 values .* 'px_r'"):
            _load(tmp_path / "model", False)

    def test_weights_that_are_not_finite_are_not_saved(self, fitted, tmp_path):
        model = copy.deepcopy(fitted)
        with torch.no_grad():
            model.module.px_r[0] = torch.inf
        with pytest.raises(ScreenError, match=r"1 values .* 'px_r'"):
            model.save(tmp_path / "model")
        assert not (tmp_path / "model").exists()

    def test_a_newer_format(self, fitted, tmp_path):
        fitted.save(tmp_path / "model")
        self._change(tmp_path / "model", lambda c: c["scvi_sams"].update(format=99))
        with pytest.raises(ScreenError, match="format 99.*Update"):
            _load(tmp_path / "model", False)

    def test_another_class(self, fitted, tmp_path):
        fitted.save(tmp_path / "model")
        with pytest.raises(ScreenError, match=r"use SAMSVAE\.load"):
            CPAVAE.load(tmp_path / "model", False)

    def test_arguments_of_another_version(self, fitted, tmp_path):
        fitted.save(tmp_path / "model")
        self._change(
            tmp_path / "model",
            lambda c: c["attr_dict"]["init_params_"]["non_kwargs"].update(n_frobs=3),
        )
        with pytest.raises(ScreenError, match="written by scvi-sams .*n_frobs"):
            _load(tmp_path / "model", False)

    def test_no_model(self, tmp_path):
        with pytest.raises(ScreenError, match="no model at .*missing"):
            _load(tmp_path / "missing", False)
        torch.save([1], tmp_path / "model.pt")
        with pytest.raises(ScreenError, match="not the file of a model"):
            _load(tmp_path, False)

    def test_cells_that_are_damaged(self, fitted, tmp_path):
        fitted.save(tmp_path / "model", save_anndata=True)
        (tmp_path / "model" / "adata.h5ad").write_bytes(b"half a file")
        with pytest.raises(ScreenError, match=r"adata\.h5ad is damaged"):
            _load(tmp_path / "model", None)
        (tmp_path / "model" / "adata.h5ad").unlink()
        with pytest.warns(UserWarning, match="without cells"):
            assert _load(tmp_path / "model", None).adata is None

    def test_arguments_that_a_subclass_does_not_record(self, screen, tmp_path):
        class Wider(SAMSVAE):
            def __init__(self, adata=None, registry=None, width=1, **kwargs):
                super().__init__(adata, registry, n_hidden=16 * width, **kwargs)

        class WiderRecorded(Wider):
            def __init__(self, adata=None, registry=None, width=1, **kwargs):
                super().__init__(adata, registry, width, **kwargs)
                self.init_params_ = self._get_init_params(locals())

        Wider.setup_anndata(screen, **SETUP)
        with pytest.raises(ScreenError, match="Wider does not record 'width', 'kwargs'"):
            Wider(screen, width=2, n_latent=3).save(tmp_path / "model")
        WiderRecorded.setup_anndata(screen, **SETUP)
        WiderRecorded(screen, width=2, n_latent=3).save(tmp_path / "model")
        loaded = WiderRecorded.load(tmp_path / "model", False, accelerator="cpu")
        assert loaded.init_params_["non_kwargs"] == {"width": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    faults.save_a_model(folder / "model", n_hidden=16)
    return folder


class TestFaults:
    def test_damaged_copies(self, folder):
        found = faults.damaged_copies(folder, 60)
        assert found["refused by name"] + found["loaded right"] == found["copies"] == 60
        assert found["refused by name"] > 30

    def test_every_part_has_a_checksum(self, folder):
        with zipfile.ZipFile(folder / "model" / "model.pt") as archive:
            assert all(part.CRC for part in archive.infolist() if part.file_size)

    def test_kills(self, folder):
        assert faults.kills(folder, 4)["a model that loads"] == 4

    def test_full_disk(self, fitted, tmp_path):
        """What was there stays, and nothing else is left."""
        fitted.save(tmp_path / "model", save_anndata=True)
        before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
        script = (
            "import resource, sys\n"
            "from scvi_sams import SAMSVAE\n"
            "model = SAMSVAE.load(sys.argv[1], accelerator='cpu')\n"
            "limit = int(sys.argv[2])\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
            "model.save(sys.argv[1], overwrite=True)\n"
        )
        limit = len(before["model.pt"]) // 2
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script, tmp_path / "model", str(limit)],
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 1
        assert "could not be saved to" in done.stderr.splitlines()[-1]
        assert "What was there before is as it was" in done.stderr.splitlines()[-1]
        after = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
        assert after == before

    def test_no_part_is_left(self, fitted, tmp_path):
        fitted.save(tmp_path / "model", save_anndata=True)
        names = {path.name for path in (tmp_path / "model").iterdir()}
        assert names == {"model.pt", "adata.h5ad"}


def test_a_model_can_be_copied(fitted):
    copied = copy.deepcopy(fitted)
    np.testing.assert_array_equal(_predict(copied), _predict(fitted))


def test_cells_can_be_let_go(screen, tmp_path):
    """scvi-tools keeps every AnnData that was set up, until it is told to let it go."""
    SAMSVAE.setup_anndata(screen, **SETUP)
    adata = screen.copy()
    SAMSVAE.setup_anndata(adata, **SETUP)
    model = SAMSVAE(adata, **SIZE)
    kept = weakref.ref(adata)
    model.deregister_manager(adata)
    del model, adata
    gc.collect()
    assert kept() is None


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
        with pytest.raises(ScreenError, match="lacks 30: 'gene_51'"):
            _load(tmp_path / "model", fitted.adata[:, :50].copy())

    def test_permuted_genes(self, fitted, tmp_path):
        fitted.save(str(tmp_path / "model"))
        loaded = _load(tmp_path / "model", fitted.adata[:, ::-1].copy())
        assert list(loaded.adata.var_names) == list(fitted.get_var_names())

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
