from __future__ import annotations

import pytest

import scvi_sams


@pytest.fixture(scope="package")
def trained_model():
    adata = scvi_sams.datasets.simulated_screen(
        n_cells=400, n_genes=40, n_perturbations=10, n_pairs=3
    )
    scvi_sams.SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control")
    model = scvi_sams.SAMSVAE(adata, n_latent=6, n_hidden=16)
    model.train(max_epochs=2, accelerator="cpu", check_val_every_n_epoch=1)
    return model


@pytest.fixture
def name_boxes():
    """Boxes in pixels, by name, of the names that were placed beside points."""

    def boxes(ax):
        ax.figure.canvas.draw()
        (labels,) = (artist for artist in ax.artists if hasattr(artist, "boxes"))
        return labels.boxes

    return boxes
