from __future__ import annotations

import pytest
import torch

from scvi_sams import SAMSVAE
from scvi_sams.datasets import simulated_screen
from scvi_sams.module import closed_form
from scvi_sams.module.closed_form import one_thread


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_threads_are_back_after_the_block(two_threads):
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_threads_are_back_after_an_error(two_threads):
    with pytest.raises(ZeroDivisionError), one_thread():
        _ = 1 / 0
    assert torch.get_num_threads() == 2


def test_the_search_for_a_frame_takes_one(two_threads, monkeypatch):
    seen = []

    def record(shifts, generator):
        seen.append(torch.get_num_threads())
        return torch.eye(shifts.shape[1])

    monkeypatch.setattr(closed_form, "sparse_rotation", record)
    adata = simulated_screen(n_cells=200, n_genes=20, n_perturbations=3, n_pairs=0)
    SAMSVAE.setup_anndata(
        adata, layer="counts", perturbation_key="perturbation", control="control"
    )
    model = SAMSVAE(adata, n_latent=4, n_hidden=8)
    model.train(max_epochs=2, accelerator="cpu", enable_progress_bar=False)
    assert seen == [1]
    assert torch.get_num_threads() == 2
