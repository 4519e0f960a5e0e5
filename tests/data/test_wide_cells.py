"""One cell of many perturbations, which must not widen what all others need."""

from __future__ import annotations

import anndata
import numpy as np
import pytest
import torch
from scipy import sparse

from scvi_sams import SAMSVAE
from scvi_sams.data.field import registered_conditions, registered_dosage
from scvi_sams.data.loader import DeviceCells
from scvi_sams.model.read_outs import controls_of
from scvi_sams.train import SAMSDataSplitter

N, T = 400, 60


def _calls(most):
    rng = np.random.default_rng(0)
    calls = np.zeros((N, T), np.int8)
    for cell in range(N):
        calls[cell, rng.choice(T, rng.integers(0, 5), replace=False)] = 1
    calls[7, :most] = 1
    return calls


def _registered(most):
    adata = anndata.AnnData(
        sparse.csr_matrix(np.random.default_rng(1).poisson(3, (N, 20)).astype(np.float32) + 1)
    )
    adata.obs_names = [f"c{k}" for k in range(N)]
    adata.obsm["guides"] = sparse.csr_matrix(_calls(most))
    adata.uns["names"] = [f"P{k:02d}" for k in range(T)]
    keys = {"guide_key": "guides", "perturbation_names_uns_key": "names"}
    targets = {name: name for name in adata.uns["names"]}
    with pytest.warns(UserWarning, match="cells of .* without a guide: taken for controls"):
        SAMSVAE.setup_anndata(adata, **keys, guide_targets=targets)
    return adata, SAMSVAE._get_most_recent_anndata_manager(adata)


def _bytes(values):
    if sparse.issparse(values):
        return values.data.nbytes + values.indices.nbytes + values.indptr.nbytes
    return values.nbytes


def test_what_is_registered_is_the_same_in_less():
    sizes = {}
    for most in (4, 60):
        adata, manager = _registered(most)
        np.testing.assert_array_equal(registered_dosage(manager).toarray(), _calls(most))
        conditions = registered_conditions(manager)
        np.testing.assert_array_equal(conditions.cell_matrix.toarray(), _calls(most))
        keys = [key for key in adata.obsm if key.startswith("_scvi")]
        assert len(keys) == 3
        sizes[most] = sum(_bytes(adata.obsm[key]) for key in keys)
        model = SAMSVAE(adata, n_latent=2, n_hidden=4)
        np.testing.assert_array_equal(controls_of(model), ~_calls(most).any(axis=1))
    assert sizes[60] < 2 * sizes[4]


@pytest.mark.parametrize("placement", ["device", "host"])
def test_minibatches_have_the_columns_that_their_cells_need(placement):
    _, manager = _registered(60)
    splitter = SAMSDataSplitter(manager, train_size=1.0, batch_size=16, data_placement=placement)
    splitter.setup()
    widths, rows = [], 0
    for tensors in splitter.train_dataloader():
        dose, index = tensors["dose"], tensors["perturbation"].long()
        assert dose.shape == index.shape == tensors["guide"].shape
        dense = torch.zeros(len(dose), T).scatter_add(1, index, dose.float())
        assert dense.max() <= 1
        widths.append(dose.shape[1])
        rows += int(dense.sum())
    assert rows == _calls(60).sum()
    if placement == "device":
        assert sorted(set(widths)) == [8, 60]
        assert widths.count(60) == 1
    else:
        assert set(widths) == {60}


def test_the_fit_is_that_of_full_columns():
    """Columns that nobody fills add nothing: elements and statistics of a step are the same."""
    adata, manager = _registered(60)
    cells = np.delete(np.arange(N), 7)[:64]
    narrow = DeviceCells(manager, cells)[np.arange(64)]
    assert narrow["dose"].shape[1] == 8
    wide = dict(narrow)
    for key in ("dose", "perturbation", "guide"):
        filler = torch.zeros(64, 52, dtype=narrow[key].dtype)
        wide[key] = torch.cat([narrow[key], filler], 1)
    outcomes = []
    for tensors in (narrow, wide):
        torch.manual_seed(0)
        model = SAMSVAE(adata, n_latent=3, n_hidden=8, dropout_rate=0.0)
        module = model.module.train()
        module.n_training_cells = N
        inference, _, losses = module(tensors)
        module.observe(inference)
        statistics = module.closed_form.statistics
        outcomes.append((losses.loss.item(), statistics.linear, statistics.n_occurrences))
    assert outcomes[0][0] == pytest.approx(outcomes[1][0], rel=1e-6)
    for one, other in zip(outcomes[0][1:], outcomes[1][1:], strict=True):
        torch.testing.assert_close(one, other)
