"""Training with ``torch.compile``: the same figures, compiled once and not at every step."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import scvi
import torch
from lightning.pytorch.callbacks import LambdaCallback

import scvi_sams

# Torch's own: it looks at every tensor it meets, and uses what it has deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
]

BATCH_SIZE = 100
PAPER = {"basal_posterior": "amortized", "embedding_posterior": "correlated"}


@pytest.fixture(scope="module")
def adata():
    adata = scvi_sams.datasets.simulated_screen(
        n_cells=500, n_genes=40, n_perturbations=6, n_pairs=2, n_latent=3
    )
    scvi_sams.SAMSVAE.setup_anndata(
        adata, layer="counts", perturbation_key="perturbation", control="control"
    )
    return adata


@pytest.fixture(autouse=True)
def as_it_was():
    """scvi-tools tells the compiler to hide errors, for good; none must hide here."""
    torch._dynamo.reset()
    before = torch._dynamo.config.suppress_errors
    yield
    torch._dynamo.config.suppress_errors = before
    torch._dynamo.reset()


def fit(adata, settings, callback=None, **plan) -> scvi_sams.SAMSVAE:
    scvi.settings.seed = 0
    model = scvi_sams.SAMSVAE(adata, n_latent=4, n_hidden=16, **settings)
    model.train(
        4,
        batch_size=BATCH_SIZE,  # divides the cells: each minibatch has the same shape
        train_size=1.0,
        accelerator="cpu",
        enable_progress_bar=False,
        logger=None,
        callbacks=[] if callback is None else [callback],
        plan_kwargs={"mask_warmup_fraction": 0.0} | plan,
    )
    return model


def losses(model) -> np.ndarray:
    return model.history["train_loss"].iloc[:, 0].to_numpy(dtype=float)


@pytest.mark.parametrize(
    ("settings", "plan"),
    [
        ({}, {}),
        pytest.param(
            {"direct_effects": False, **PAPER}, {"n_particles": 2}, marks=pytest.mark.slow
        ),
        pytest.param({"gene_likelihood": "zinb"}, {}, marks=pytest.mark.slow),
    ],
    ids=["default", "paper", "zinb"],
)
def test_nothing_is_compiled_again(adata, settings, plan):
    """Doses, counts that are not zero and pairs have other numbers in every minibatch."""
    steps, graphs = [], []

    def backend(graph, inputs):
        graphs.append(len(steps))
        return graph.forward

    compiled = fit(
        adata,
        settings,
        LambdaCallback(on_train_batch_end=lambda *args: steps.append(1)),
        compile=True,
        compile_kwargs={"backend": backend},
        **plan,
    )
    plain = fit(adata, settings, **plan)
    assert len(steps) == 4 * 500 / BATCH_SIZE
    # With the first step only; where shifts are learned by gradient, once more with masks on.
    assert set(graphs) == ({0} if compiled.module.closed_form is not None else {0, 1})
    np.testing.assert_allclose(losses(compiled), losses(plain), rtol=1e-6)


@pytest.mark.slow  # the compiler of C++ works for a minute
@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))),
    reason="torch.compile needs a C++ compiler, and none is installed",
)
def test_compiled_training_gives_the_same_figures(adata):
    plain = fit(adata, {})
    with torch._inductor.config.patch(fallback_random=True):  # the same draws
        compiled = fit(adata, {}, compile=True)
    assert compiled.module.training is False
    np.testing.assert_allclose(losses(compiled), losses(plain), rtol=1e-4)
    products = []  # of effects, as rounding may exchange latents
    for model in (plain, compiled):
        effect = model.get_perturbation_effect().to_numpy()
        products.append(effect @ effect.T)
    np.testing.assert_allclose(products[1], products[0], atol=0.01 * products[0].max())
