from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import torch

import scvi_sams


@pytest.fixture(scope="module")
def fitted(screen_path, tmp_path_factory):
    """A folder with a model, as ``fit`` leaves it."""
    adata = ad.read_h5ad(screen_path)
    scvi_sams.SAMSVAE.setup_anndata(
        adata, perturbation_key="perturbation", control="control", batch_key="replicate"
    )
    model = scvi_sams.SAMSVAE(adata, n_latent=4, n_hidden=16)
    model.train(max_epochs=1, accelerator="cpu")
    folder = tmp_path_factory.mktemp("fitted")
    model.save(str(folder / "model"))
    return folder


def test_conditions_never_measured_are_written(run, fitted, tmp_path):
    output = tmp_path / "new" / "cells.h5ad"
    done = run(
        *("predict", fitted, "--conditions", "P001+P006", "P002", "--n-samples", 7),
        *("--batch", "replicate_2", "--library-size", 500, "-o", output),
    )
    assert done.code == 0, done.err
    cells = ad.read_h5ad(output)
    assert cells.shape == (14, 60)
    assert cells.obs["condition"].value_counts().to_dict() == {"P001+P006": 7, "P002": 7}
    assert set(cells.obs["batch"]) == {"replicate_2"}
    assert (cells.obs["library_size"] == 500).all()
    assert "14 cells x 60 genes" in done.out
    assert [path.name for path in output.parent.iterdir()] == ["cells.h5ad"]


def test_one_seed_gives_one_result(run, fitted, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(
            *("predict", fitted, "--conditions", "P001", "--n-samples", 5),
            *("--seed", seed, "-o", tmp_path / f"{name}.h5ad"),
        )
    first, same, other = (ad.read_h5ad(tmp_path / f"{name}.h5ad").to_df() for name in "abc")
    np.testing.assert_array_equal(first, same)
    assert (first.to_numpy() != other.to_numpy()).any()


@pytest.mark.parametrize(
    ("words", "culprit"),
    [
        (["--conditions", "P01"], "'P01' (nearest: 'P001'"),
        (["--conditions", "P001", "--batch", "replicate_9"], "replicate_9"),
    ],
)
def test_what_the_model_does_not_know_is_named(run, fitted, tmp_path, words, culprit):
    done = run("predict", fitted, *words, "-o", tmp_path / "cells.h5ad")
    assert done.code == 1
    assert culprit in done.error
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_only_when_asked(run, fitted, tmp_path):
    output = tmp_path / "cells.h5ad"
    output.write_text("mine")
    words = ("predict", fitted, "--conditions", "P001", "--n-samples", 2, "-o", output)
    done = run(*words)
    assert (done.code, output.read_text()) == (1, "mine")
    assert "--overwrite" in done.error
    assert run(*words, "--overwrite").code == 0
    assert ad.read_h5ad(output).n_obs == 2


def test_a_folder_without_a_model_is_named(run, tmp_path):
    done = run("predict", tmp_path, "--conditions", "P001", "-o", tmp_path / "cells.h5ad")
    assert done.code == 1
    assert str(tmp_path) in done.error


@pytest.mark.parametrize("damage", ["cut off", "something else", "of another model"])
def test_a_model_that_cannot_be_read_is_named(run, fitted, tmp_path, damage):
    folder = tmp_path / "fit"
    (folder / "model").mkdir(parents=True)
    path = folder / "model" / "model.pt"
    whole = (fitted / "model" / "model.pt").read_bytes()
    path.write_bytes(whole[:1_000] if damage == "cut off" else b"notes")
    if damage == "of another model":
        state = torch.load(fitted / "model" / "model.pt", weights_only=False)
        state["attr_dict"]["registry_"]["model_name"] = "SCVI"
        torch.save(state, path)
    done = run("predict", folder, "--conditions", "P001", "-o", tmp_path / "cells.h5ad")
    assert done.code == 1
    assert done.err.count("\n") == 1
    foreign = damage == "of another model"
    cause = "no model that fit wrote: it is a SCVI" if foreign else "damaged: "
    assert f"{path} is {cause}" in done.error
