"""Cells that stream from an annbatch collection against the same cells in an AnnData."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from scipy import sparse

import scvi_sams
from scvi_sams import SAMSVAE, ScreenError
from scvi_sams.train import StreamedCells

QUIET = {"enable_progress_bar": False, "accelerator": "cpu"}
KEYS = {
    "perturbation_key": "perturbation",
    "control": "control",
    "batch_key": "replicate",
    "size_factor_key": "total_counts",
    "continuous_covariate_keys": ["stress"],
}


class Collection:
    """What annbatch.Loader (0.2.2 and 0.3.1) does of what is asked of it here, for Python 3.11."""

    def __init__(self, parts: list[anndata.AnnData], to=None) -> None:
        self._x = [part.X for part in parts]
        self._obs = [part.obs for part in parts]
        self.var = parts[0].var
        self.n_obs, self.n_var = sum(part.n_obs for part in parts), parts[0].n_vars
        self._batch_sampler, self._return_index, self.to = None, False, to
        self.rows_read = []

    def __iter__(self):
        starts = np.cumsum([0, *(len(obs) for obs in self._obs)])
        for request in self._batch_sampler.sample(self.n_obs):
            rows = np.concatenate([np.arange(s.start, s.stop) for s in request["requests"]])
            self.rows_read.append(rows)
            # Data set by data set, and back to the order that was asked for.
            part_of = np.searchsorted(starts, rows, side="right") - 1
            order = np.argsort(part_of, kind="stable")
            grouped = [rows[order][part_of[order] == k] - starts[k] for k in range(len(self._x))]
            x = sparse.vstack([m[r] for m, r in zip(self._x, grouped, strict=True)], "csr")
            obs = pd.concat([o.iloc[r] for o, r in zip(self._obs, grouped, strict=True)])
            inverse = np.argsort(order)
            for split in request["splits"]:
                data = x[inverse[split]]
                if self.to == "torch":
                    parts = data.indptr, data.indices, data.data
                    data = torch.sparse_csr_tensor(*parts, data.shape, check_invariants=True)
                yield {
                    "X": data,
                    "obs": obs.iloc[inverse[split]],
                    "var": self.var,
                    "index": rows[order][inverse[split]] if self._return_index else None,
                }


@pytest.fixture(scope="module")
def screen():
    adata = scvi_sams.datasets.simulated_screen(n_cells=600, n_genes=40, n_perturbations=6)
    adata.X = adata.layers["counts"].astype(np.float32)
    adata.obs["stress"] = np.random.default_rng(0).normal(size=600)
    scvi_sams.evaluation.split_cells(adata)
    return adata


def collection(screen, **kwargs):
    return Collection([screen[:50].copy(), screen[50:430].copy(), screen[430:].copy()], **kwargs)


@pytest.fixture(scope="module")
def of_screen(screen):
    adata = screen.copy()
    SAMSVAE.setup_anndata(adata, **KEYS)
    return SAMSVAE(adata, n_latent=3, n_hidden=8)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("to", [None, "torch"])
def test_minibatches_are_those_of_the_anndata(screen, of_screen, to):
    cells = SAMSVAE.setup_annbatch(collection(screen, to=to), **KEYS)
    order = np.random.default_rng(1).permutation(600)[:300]
    order = np.concatenate([order, order[:3]])
    found = list(cells.inference_dataloader(order))
    expected = list(of_screen._make_data_loader(of_screen.adata, indices=order, batch_size=128))
    assert len(cells.inference_dataloader(order)) == len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key].dtype == value.dtype
            np.testing.assert_array_equal(ours[key], value, err_msg=key)


def test_the_registry_is_that_of_the_anndata(screen, of_screen):
    cells = SAMSVAE.setup_annbatch(collection(screen), **KEYS)
    model = SAMSVAE(registry=cells.registry, n_latent=3, n_hidden=8)
    assert model.perturbation_names == of_screen.perturbation_names
    assert list(model.get_var_names()) == list(of_screen.get_var_names())
    assert dict(model.summary_stats) == dict(of_screen.summary_stats)


def test_cells_are_held_out_by_a_column(screen):
    source = collection(screen)
    cells = SAMSVAE.setup_annbatch(
        source, **KEYS, split_key="split", batch_size=32, chunk_size=64, preload_nchunks=3
    )
    parts = scvi_sams.evaluation.split_indices(screen)
    ours = cells.train_idx, cells.val_idx, cells.test_idx
    for found, expected in zip(ours, parts, strict=True):
        np.testing.assert_array_equal(found, expected)
    cells.train_dataloader()
    x = np.concatenate([batch["X"] for batch in cells.train_dataloader()])
    expected = screen.X[parts[0]].toarray()
    assert (x != expected).any()  # shuffled
    np.testing.assert_array_equal(x[np.lexsort(x.T)], expected[np.lexsort(expected.T)])
    n_read = sum(len(rows) for rows in source.rows_read)
    assert 0 < n_read < 2.5 * len(parts[0])  # pieces are read whole, and not over and over
    sizes = [len(batch["X"]) for batch in cells.train_dataloader()]
    assert set(sizes[:-1]) == {32}
    validation = np.concatenate([batch["X"] for batch in cells.val_dataloader()])
    np.testing.assert_array_equal(validation, screen.X[parts[1]].toarray())


def fit(screen, **kwargs):
    cells = SAMSVAE.setup_annbatch(collection(screen), **KEYS, split_key="split", **kwargs)
    scvi.settings.seed = 0
    model = SAMSVAE(registry=cells.registry, n_latent=3, n_hidden=8)
    model.train(max_epochs=4, datamodule=cells, check_val_every_n_epoch=1, **QUIET)
    return model, cells


@pytest.fixture(scope="module")
def fitted(screen):
    return fit(screen)


def test_a_seed_gives_the_same_bits(screen, fitted):
    again, _ = fit(screen)
    for name in ("train_loss", "elbo_validation"):
        losses = [model.history[name].to_numpy(float) for model in (fitted[0], again)]
        assert np.isfinite(losses[0]).all()
        np.testing.assert_array_equal(*losses)


def test_read_outs_are_those_of_the_anndata(screen, fitted, tmp_path):
    """Saved, and loaded with the cells in memory."""
    model, cells = fitted
    model.save(tmp_path / "model")
    loaded = SAMSVAE.load(tmp_path / "model", screen.copy())
    held_out = cells.val_idx
    loader = list(cells.inference_dataloader(held_out))  # a data loader draws a seed as it starts
    in_memory = list(loaded._make_data_loader(loaded.adata, indices=held_out))
    for representation in ("full", "basal", "perturbation"):
        np.testing.assert_allclose(
            model.get_latent_representation(dataloader=loader, representation=representation),
            loaded.get_latent_representation(indices=held_out, representation=representation),
            atol=1e-6,
        )
    pd.testing.assert_frame_equal(model.get_perturbation_mask(), loaded.get_perturbation_mask())
    for name, kwargs in (
        ("get_elbo", {"return_mean": False}),
        ("get_iwelbo", {"return_mean": False, "n_particles": 3}),
    ):
        values = []
        for each, where in ((model, {"dataloader": loader}), (loaded, {"dataloader": in_memory})):
            torch.manual_seed(0)
            values.append(getattr(each, name)(**where, **kwargs))
        np.testing.assert_allclose(*values, rtol=1e-5)
    expression = model.get_normalized_expression(dataloader=loader)
    assert np.asarray(expression).shape == (len(held_out), 40)
    error = model.get_reconstruction_error(dataloader=loader)
    assert np.isfinite(list(error.values()) if isinstance(error, dict) else error).all()
    effect = model.get_average_treatment_effect(["P001"], n_samples=2, n_cells=10)
    assert np.isfinite(effect.X).all()
    assert model.predict(["P001+P002"], n_samples=4).n_obs == 4


def test_what_cannot_be_used_is_named(screen):
    with pytest.raises(ScreenError, match=r"no column 'guide'; it has perturbation"):
        SAMSVAE.setup_annbatch(collection(screen), perturbation_key="guide", control="control")
    with pytest.raises(ScreenError, match="without obs and var"):
        SAMSVAE.setup_annbatch(object(), perturbation_key="guide")
    other = screen.copy()
    other.obs["split"] = "learn"
    with pytest.raises(ScreenError, match="holds 'learn'; a cell is 'train'"):
        SAMSVAE.setup_annbatch(collection(other), **KEYS, split_key="split")
    other.obs["split"] = "test"
    with pytest.raises(ScreenError, match="No cell is to be trained on"):
        SAMSVAE.setup_annbatch(collection(other), **KEYS, split_key="split")
    cells = SAMSVAE.setup_annbatch(collection(screen), **KEYS)
    with pytest.raises(ScreenError, match="600 cells by their positions"):
        cells.inference_dataloader([600])
    other.X = other.X.log1p()
    cells = SAMSVAE.setup_annbatch(collection(other), **KEYS)
    with pytest.raises(ScreenError, match="that are no counts"):
        next(iter(cells.train_dataloader()))


def test_labels_of_parts_need_not_be_of_the_same_categories(screen):
    parts = [screen[:300].copy(), screen[300:].copy()]
    for part in parts:
        part.obs["perturbation"] = part.obs["perturbation"].astype("category")
    is_rare = parts[0].obs["perturbation"] == "P001"
    parts[0] = parts[0][~is_rare].copy()
    cells = SAMSVAE.setup_annbatch(Collection(parts), **KEYS)
    whole = anndata.concat(parts, merge="same")
    SAMSVAE.setup_anndata(whole, **KEYS)
    expected = SAMSVAE(whole, n_latent=3, n_hidden=8)
    assert SAMSVAE(registry=cells.registry).perturbation_names == expected.perturbation_names


def test_with_annbatch_itself(screen, tmp_path):
    """On Python 3.12 and later, where it can be installed."""
    annbatch = pytest.importorskip("annbatch")
    paths = []
    for number, rows in enumerate((slice(0, 250), slice(250, 600))):
        paths.append(tmp_path / f"plate_{number}.h5ad")
        screen[rows].copy().write_h5ad(paths[-1])
    store = annbatch.DatasetCollection(tmp_path / "screen.zarr")
    store.add_adatas(paths)
    loader = annbatch.Loader(preload_to_gpu=False).use_collection(store)
    cells = SAMSVAE.setup_annbatch(loader, **KEYS, split_key="split")
    assert isinstance(cells, StreamedCells)
    x = np.concatenate([batch["X"] for batch in cells.inference_dataloader()])
    np.testing.assert_array_equal(np.sort(x.sum(1)), np.sort(np.asarray(screen.X.sum(1)).ravel()))
    np.testing.assert_allclose(x.sum(1), cells._columns["size_factor"].ravel())
    model = SAMSVAE(registry=cells.registry, n_latent=3, n_hidden=8)
    model.train(max_epochs=2, datamodule=cells, **QUIET)
    assert np.isfinite(model.get_elbo(dataloader=cells.inference_dataloader(cells.val_idx)))
