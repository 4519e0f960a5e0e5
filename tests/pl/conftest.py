from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pytest

import scvi_sams


@dataclass
class KnownReadouts:
    """A model of which a plot sees the tables alone, so that a test can choose them."""

    mask: pd.DataFrame = field(default_factory=pd.DataFrame)
    effect: pd.DataFrame = field(default_factory=pd.DataFrame)
    history: dict[str, pd.DataFrame] = field(default_factory=dict)
    curves: pd.DataFrame = field(default_factory=pd.DataFrame)
    adata: None = None

    def get_perturbation_mask(self) -> pd.DataFrame:
        return self.mask

    def get_perturbation_effect(self) -> pd.DataFrame:
        return self.effect

    def get_dose_response(self, credible_level: float) -> pd.DataFrame:
        return self.curves


@pytest.fixture
def known_readouts():
    """Make a model with given masks, perturbations x latents; effects are masks times `size`."""

    def make(mask, size=2.0, history=None, curves=None):
        mask = np.asarray(mask, dtype=float)
        frame = pd.DataFrame(
            mask,
            index=[f"GENE{row}" for row in range(mask.shape[0])],
            columns=[f"latent_{column}" for column in range(mask.shape[1])],
        )
        curves = pd.DataFrame() if curves is None else curves
        return KnownReadouts(frame, frame * size, history or {}, curves)

    return make


@pytest.fixture(scope="module")
def trained_model():
    adata = scvi_sams.datasets.simulated_screen(
        n_cells=400, n_genes=40, n_perturbations=10, n_pairs=3
    )
    scvi_sams.SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control")
    model = scvi_sams.SAMSVAE(adata, n_latent=6, n_hidden=16)
    model.train(max_epochs=2, accelerator="cpu", check_val_every_n_epoch=1)
    return model
