"""Several files as one screen: the same cells as concatenated, never zeros for what is gone."""

from __future__ import annotations

import anndata
import h5py
import numpy as np
import pytest
import scvi
from scipy import sparse

import scvi_sams
from scvi_sams import SAMSVAE, ScreenError
from scvi_sams.data import join_files
from scvi_sams.data.matrices import DiskMatrix

SETUP = {"perturbation_key": "perturbation", "control": "control"}


@pytest.fixture(scope="module")
def parts():
    screen = scvi_sams.datasets.simulated_screen(n_cells=300, n_genes=40, n_perturbations=6)
    screen.obsm["place"] = np.arange(600.0).reshape(300, 2)
    del screen.uns["truth"]
    bounds = [0, 50, 51, 200, 300]
    return [screen[a:b].copy() for a, b in zip(bounds, bounds[1:], strict=False)]


@pytest.fixture
def files(parts, tmp_path):
    (tmp_path / "plates").mkdir()
    paths = [tmp_path / "plates" / f"plate_{k}.h5ad" for k in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        part.write_h5ad(path)
    return paths


@pytest.mark.parametrize("is_dense", [False, True])
def test_cells_are_those_of_all_files(parts, tmp_path, is_dense):
    paths = []
    for k, part in enumerate(parts):
        part = part.copy()
        if is_dense:
            part.X = part.X.toarray()
        if k == 1:  # stored in another type
            part.X = part.X.astype(np.int32)
        paths.append(tmp_path / f"plate_{k}.h5ad")
        part.write_h5ad(paths[-1])
    adata = join_files(map(str, paths), tmp_path / "screen.h5ad")
    whole = anndata.concat(parts, merge="same")
    assert adata.isbacked
    assert list(adata.obs_names) == list(whole.obs_names)
    assert list(adata.var_names) == list(whole.var_names)
    assert adata.obs["perturbation"].tolist() == whole.obs["perturbation"].tolist()
    assert adata.obs["file"].value_counts(sort=False).tolist() == [50, 1, 149, 100]
    np.testing.assert_array_equal(adata.obsm["place"], whole.obsm["place"])
    assert not adata.layers
    memory = adata.to_memory().X
    np.testing.assert_array_equal(
        memory.toarray() if sparse.issparse(memory) else memory, whole.X.toarray()
    )
    order = np.random.default_rng(0).permutation(300)[:120]
    rows = DiskMatrix(adata.X)[order]
    rows = rows.toarray() if sparse.issparse(rows) else rows
    np.testing.assert_array_equal(rows, whole.X[order].toarray())
    adata.file.close()


def test_no_counts_are_written(files, tmp_path):
    join_files(files, tmp_path / "screen.h5ad").file.close()
    with h5py.File(tmp_path / "screen.h5ad") as file:
        for name in ("data", "indices"):
            assert file["X"][name].is_virtual
            assert file["X"][name].id.get_storage_size() == 0


def test_a_layer_of_the_files_may_hold_the_counts(parts, tmp_path):
    paths = []
    for k, part in enumerate(parts[2:]):
        part = part.copy()
        part.X = part.X.log1p()
        paths.append(tmp_path / f"plate_{k}.h5ad")
        part.write_h5ad(paths[-1])
    adata = join_files(paths, tmp_path / "screen.h5ad", layer="counts")
    expected = sparse.vstack([part.layers["counts"] for part in parts[2:]])
    np.testing.assert_array_equal(adata.to_memory().X.toarray(), expected.toarray())
    adata.file.close()
    with pytest.raises(ScreenError, match=r"plate_0\.h5ad has no layers/raw"):
        join_files(paths, tmp_path / "other.h5ad", layer="raw")


def test_a_fit_is_that_of_one_file(files, parts, tmp_path):
    one = anndata.concat(parts, merge="same")
    one.write_h5ad(tmp_path / "one.h5ad")
    losses, latents = [], []
    for adata in (
        join_files(files, tmp_path / "joined.h5ad"),
        anndata.read_h5ad(tmp_path / "one.h5ad", backed="r"),
    ):
        SAMSVAE.setup_anndata(adata, **SETUP)
        scvi.settings.seed = 0
        model = SAMSVAE(adata, n_latent=3, n_hidden=8)
        model.train(
            max_epochs=2, data_placement="disk", enable_progress_bar=False, accelerator="cpu"
        )
        losses.append(model.history["train_loss"].to_numpy(float))
        latents.append(model.get_latent_representation())
        adata.file.close()
    np.testing.assert_array_equal(*losses)
    np.testing.assert_array_equal(*latents)


def test_names_that_repeat_are_told_apart(parts, tmp_path):
    paths = []
    for k in range(2):
        (tmp_path / f"lane_{k}").mkdir()
        paths.append(tmp_path / f"lane_{k}" / "cells.h5ad")
        parts[0].write_h5ad(paths[-1])
    adata = join_files(paths, tmp_path / "screen.h5ad", label="lane")
    assert adata.obs_names.is_unique
    assert adata.obs["lane"].cat.categories.tolist() == ["lane_0/cells", "lane_1/cells"]
    adata.file.close()


def test_what_cannot_be_joined_is_named(files, parts, tmp_path):
    joined = tmp_path / "screen.h5ad"
    with pytest.raises(ScreenError, match="list is empty"):
        join_files([], joined)
    with pytest.raises(ScreenError, match=r"none\.h5ad is no h5ad file"):
        join_files([*files, tmp_path / "none.h5ad"], joined)
    with pytest.raises(ScreenError, match=r"column 'replicate' already"):
        join_files(files, joined, label="replicate")
    other = tmp_path / "other.h5ad"
    parts[0][:, ::-1].copy().write_h5ad(other)
    with pytest.raises(ScreenError, match=r"other\.h5ad has its genes in another order"):
        join_files([*files, other], joined)
    parts[0][:, 1:].copy().write_h5ad(other)
    with pytest.raises(ScreenError, match=r"other\.h5ad has other genes \(.*gene"):
        join_files([*files, other], joined)
    by_gene = parts[0].copy()
    by_gene.X = by_gene.X.tocsc()
    by_gene.write_h5ad(other)
    with pytest.raises(ScreenError, match=r"X of .*other\.h5ad is stored as csc_matrix"):
        join_files([*files, other], joined)
    assert not joined.exists()
    join_files(files, joined).file.close()
    with pytest.raises(ScreenError, match="is there already"):
        join_files(files, joined)
    join_files(files, joined, overwrite=True).file.close()
    with pytest.raises(ScreenError, match="is there already"):
        join_files(files, files[0], overwrite=True)


def test_what_is_no_list_of_whole_files_is_named(files, parts, tmp_path):
    joined = tmp_path / "screen.h5ad"
    for given, arguments, message in (
        (str(files[0]), {}, "give a list of paths"),
        ([files[0], None], {}, "None is no path"),
        ([files[0], files[0]], {}, "given more than once"),
        (files, {"label": 5}, "give the name of a column"),
        (files, {"joined": tmp_path}, "name a file in a folder that is there"),
        (files, {"joined": tmp_path / "none" / "screen.h5ad"}, "folder that is there"),
    ):
        with pytest.raises(ScreenError, match=message):
            join_files(given, **({"joined": joined} | arguments))
    whole = files[0].read_bytes()
    cut = tmp_path / "cut.h5ad"
    cut.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(ScreenError, match=r"cut\.h5ad cannot be read, it is damaged or cut off"):
        join_files([*files, cut], joined)
    parts[0].obs["dose"] = 1.0
    parts[1].obs["dose"] = "high"
    try:
        for path, part in zip(files, parts[:2], strict=False):
            part.write_h5ad(path)
    finally:
        del parts[0].obs["dose"], parts[1].obs["dose"]
    with pytest.raises(ScreenError, match=r"obs\['dose'\] holds numbers in .*plate_0.* text in"):
        join_files(files[:2], joined)


@pytest.mark.parametrize("what", ["gone", "changed"])
def test_files_that_are_not_as_they_were_are_named(files, parts, tmp_path, what):
    adata = join_files(files, tmp_path / "screen.h5ad")
    if what == "gone":
        files[2].rename(tmp_path / "elsewhere.h5ad")
    else:
        parts[0].write_h5ad(files[2])
    message = r"plate_2\.h5ad, which " + ("is not there" if what == "gone" else "was changed")
    with pytest.raises(ScreenError, match=message):
        DiskMatrix(adata.X)
    with pytest.raises(ScreenError, match=message):
        SAMSVAE.setup_anndata(adata, **SETUP)
    adata.file.close()
