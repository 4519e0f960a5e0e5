"""What was frozen of version 0.1.0: a tiny screen, fits to it, and what is read out of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import scvi
import torch

from scvi_sams import CPAVAE, SAMSVAE, ConditionalVAE, SVAEPlus, tl

if TYPE_CHECKING:
    from collections.abc import Callable

    from anndata import AnnData

READ_OUTS_FILE = Path(__file__).with_name("read_outs.npz")
# Folders as `save` wrote them, packed: each of the files has many small parts.
CHECKPOINTS_FILE = Path(__file__).with_name("checkpoints.tar.xz")

LABELS = ("ctrl", "ctrl", "A", "B", "C", "D", "E", "A+B", "B+C", "D+E")
N_PER_LABEL, N_GENES = 20, 30
SETUP = {
    "layer": "counts",
    "perturbation_key": "perturbation",
    "control": "ctrl",
    "batch_key": "batch",
}
COVARIATES = {
    "size_factor_key": "total",
    "categorical_covariate_keys": ["phase"],
    "continuous_covariate_keys": ["stress"],
}
SIZE = {"n_latent": 4, "n_hidden": 8, "dropout_rate": 0.05}
# Large steps, and few between two updates, so that a short fit learns masks and effects.
TRAIN = {
    "batch_size": 30,
    # Version 0.1.0 had no prior of weights.
    "plan_kwargs": {"lr": 1e-2, "global_update_every": 5, "weight_precision": 0.0},
    "check_val_every_n_epoch": 1,
    "enable_progress_bar": False,
    "accelerator": "cpu",
}


def screen(seed: int = 0, *, third_batch: bool = False, new_perturbation: bool = False) -> AnnData:
    """200 cells of controls, five perturbations and three pairs, in two batches.

    Made of uniform numbers alone, whose stream NumPy does not change from version to version.
    """
    labels = np.repeat(LABELS, N_PER_LABEL)
    if new_perturbation:
        labels = np.char.replace(labels, "E", "F")
    batch = np.where(np.arange(len(labels)) % 2, "second", "first")
    if third_batch:
        batch[::4] = "third"
    rng = np.random.default_rng(seed)
    rate = np.exp(2.5 * np.random.default_rng(0).random(N_GENES) + 0.5)
    log_mean = np.log(rate) + 0.3 * (batch == "second")[:, None] * (np.arange(N_GENES) < 10)
    for number, name in enumerate("ABCDEF"):  # three programmes, up and down
        genes = slice(10 * (number % 3), 10 * (number % 3) + 8)
        change = 1.2 if number < 3 else -1.5
        log_mean[np.char.find(labels, name) >= 0, genes] += change
    noise = -np.log1p(-rng.random((5, *log_mean.shape))).mean(0)  # gamma distributed
    counts = np.floor(np.exp(log_mean) * noise + 0.3)
    adata = ad.AnnData(
        np.log1p(counts).astype(np.float32),
        obs=pd.DataFrame(
            {
                "perturbation": labels,
                "batch": batch,
                "phase": np.array(["G1", "S", "G2M"])[(3 * rng.random(len(labels))).astype(int)],
                "stress": 2 * rng.random(len(labels)) - 1,
                "total": 1.5 * counts.sum(1) + 1,
                "dose": doses(labels, rng),
            },
            index=[f"cell_{cell}" for cell in range(len(labels))],
        ),
        var=pd.DataFrame(index=[f"gene_{gene}" for gene in range(N_GENES)]),
        layers={"counts": counts.astype(np.float32)},
    )
    adata.strings_to_categoricals()
    return adata


def doses(labels: np.ndarray, rng: np.random.Generator) -> list[str]:
    """A dose of each part of each label, joined as the parts are."""
    levels = np.array(["0.3", "1.0", "3.0"])
    return ["+".join(levels[(3 * rng.random(len(s.split("+")))).astype(int)]) for s in labels]


@dataclass(frozen=True)
class Member:
    """A way to make and train a model."""

    model_class: type = SAMSVAE
    kwargs: dict[str, Any] = field(default_factory=dict)
    setup: dict[str, Any] = field(default_factory=dict)
    epochs: int = 30
    seed: int = 0
    query_of: str | None = None  # the member that it starts from
    screen: dict[str, Any] = field(default_factory=dict)
    load: dict[str, Any] = field(default_factory=dict)

    @property
    def adata(self) -> AnnData:
        return screen(**self.screen)


def _query(of: str, *, new_perturbation: bool = False, third_batch: bool = False) -> Member:
    return Member(
        epochs=3,
        query_of=of,
        screen={"seed": 1, "new_perturbation": new_perturbation, "third_batch": third_batch},
        load={"new_perturbations": new_perturbation},
    )


MEMBERS: dict[str, Member] = {
    "default": Member(),
    "residual": Member(kwargs={"basal_posterior": "residual"}),
    "gradient": Member(kwargs={"global_inference": "gradient"}),
    "mean_field": Member(
        kwargs={"global_inference": "gradient", "embedding_posterior": "mean_field"}
    ),
    "correlated_embedding": Member(
        kwargs={"global_inference": "gradient", "embedding_posterior": "correlated"}
    ),
    "basal_mean_field": Member(
        kwargs={"global_inference": "gradient", "basal_posterior": "mean_field"}
    ),
    "basal_amortized": Member(
        kwargs={"global_inference": "gradient", "basal_posterior": "amortized"}
    ),
    "interactions": Member(kwargs={"interactions": True, "interaction_prior": 0.1}),
    "hill": Member(kwargs={"dose_response": "hill"}, setup={"dosage_key": "dose"}),
    "direct_effects": Member(kwargs={"direct_effects": {"A": "gene_1", "D": "gene_17"}}),
    "mask_prior": Member(kwargs={"mask_prior": (1.0, 10.0), "mask_prior_shared_by": "latent"}),
    "zinb": Member(kwargs={"gene_likelihood": "zinb"}),
    "poisson": Member(kwargs={"gene_likelihood": "poisson"}),
    "normal": Member(
        kwargs={"gene_likelihood": "normal"}, setup={"layer": None, "is_count_data": False}
    ),
    "gene_batch": Member(kwargs={"dispersion": "gene-batch"}),
    "size_factor": Member(setup={"size_factor_key": "total"}),
    "covariates": Member(kwargs={"encode_covariates": True}, setup=COVARIATES),
    "cpavae": Member(CPAVAE),
    "cpavae_gradient": Member(CPAVAE, kwargs={"global_inference": "gradient"}),
    "svaeplus": Member(SVAEPlus),
    "conditionalvae": Member(ConditionalVAE),
    "query_batch": _query("default", third_batch=True),
    "query_batch_covariates": _query("covariates", third_batch=True),
    "query_perturbation": _query("default", new_perturbation=True),
    "query_perturbation_gradient": _query("gradient", new_perturbation=True),
}


def fit(name: str, checkpoints: Path) -> Any:
    """Fit a member from its seed; a query starts from the checkpoint of its reference."""
    member = MEMBERS[name]
    adata = member.adata
    if member.query_of is None:
        member.model_class.setup_anndata(adata, **SETUP | member.setup)
        scvi.settings.seed = member.seed
        model = member.model_class(adata, **SIZE, **member.kwargs)
    else:
        scvi.settings.seed = member.seed
        model = member.model_class.load_query_data(
            adata,
            checkpoints / member.query_of,
            trusted=True,
            accelerator="cpu",
            **member.load,
        )
    model.train(max_epochs=member.epochs, **TRAIN)
    return model


def load(name: str, checkpoints: Path) -> Any:
    """A member from its checkpoint."""
    member = MEMBERS[name]
    return member.model_class.load(
        checkpoints / name, member.adata, accelerator="cpu", trusted=True
    )


CONDITIONS = ["A", "A+B"]
CELLS = np.arange(0, 200, 6)  # of every label


def _latent(representation: str) -> Callable[[Any], Any]:
    return lambda model: model.get_latent_representation(
        indices=CELLS, representation=representation
    )


def _history(column: str) -> Callable[[Any], Any]:
    def read(model: Any) -> Any:
        if not model.history:
            raise NotImplementedError("a query that needs no gradients has no history")
        return model.history[column].astype(float)

    return read


def _interactions(column: str) -> Callable[[Any], Any]:
    return lambda model: tl.interaction_effects(model).pivot(
        index="pair", columns="latent", values=column
    )


def _effect(model: Any) -> AnnData:
    return model.get_average_treatment_effect(CONDITIONS, n_samples=5, n_cells=20)


def _predict(model: Any) -> AnnData:
    return model.predict(["A+B"], n_samples=10, return_mean=True)


# Each draws from a seed set just before. Tables give their numbers, see `figures`.
READ_OUTS: dict[str, Callable[[Any], Any]] = {
    "latent": _latent("full"),
    "latent_basal": _latent("basal"),
    "latent_perturbation": _latent("perturbation"),
    "latent_draw": lambda m: m.get_latent_representation(indices=CELLS, give_mean=False),
    "mask": lambda m: m.get_perturbation_mask(),
    "mask_prior": lambda m: tl.mask_prior(m),
    "effect": lambda m: m.get_perturbation_effect(),
    "shift": lambda m: m.get_perturbation_shift(CONDITIONS),
    "interaction_mask": _interactions("inclusion_probability"),
    "interaction_effect": _interactions("effect"),
    "dose_response": lambda m: tl.dose_response(m),
    "direct_effect": lambda m: tl.direct_effects(m),
    "treatment_effect": lambda m: _effect(m).X,
    "treatment_effect_std": lambda m: _effect(m).layers["std"],
    "predicted": lambda m: _predict(m).X,
    "predicted_std": lambda m: _predict(m).layers["std"],
    "predicted_counts": lambda m: m.predict(["A+B"], n_samples=3).X.toarray(),
    "elbo": lambda m: m.get_elbo(indices=CELLS, n_samples=3, return_mean=False),
    "iwelbo": lambda m: m.get_iwelbo(indices=CELLS, n_particles=3, return_mean=False),
    "mechanisms": lambda m: tl.mechanisms(m),
    "active_perturbations": lambda m: tl.active_perturbations(m),
    "gene_programs": lambda m: tl.gene_programs(m, counterfactual=m.counterfactual(n_cells=10)).X,
    "pair_interactions": lambda m: (
        tl.pair_interactions(
            m, [("A", "B")], n_samples=3, counterfactual=m.counterfactual(n_cells=10)
        ).X
    ),
    "perturbation_distance": lambda m: tl.perturbation_distance(
        m, counterfactual=m.counterfactual(n_cells=10)
    ),
    "differential_expression": lambda m: tl.differential_expression(
        m, ["A+B"], n_samples=5, counterfactual=m.counterfactual(n_cells=10)
    ),
    "train_loss": _history("train_loss"),
    "elbo_train": _history("elbo_train"),
    "elbo_validation": _history("elbo_validation"),
}


def figures(read_out: str, model: Any) -> np.ndarray:
    """Numbers of a read-out, drawn from a seed."""
    scvi.settings.seed = 7
    values = READ_OUTS[read_out](model)
    if isinstance(values, pd.DataFrame):
        values = values.select_dtypes("number")
    return np.asarray(values, dtype=np.float32)


def all_figures(model: Any) -> dict[str, np.ndarray]:
    """Every read-out that a member has."""
    found = {}
    for read_out in READ_OUTS:
        try:
            found[read_out] = figures(read_out, model)
        except NotImplementedError:  # it has no masks, say
            continue
    return found


def arithmetic() -> str:
    """Digest of some sums and functions as this processor and this torch round them."""
    x = torch.as_tensor(np.random.default_rng(0).random((60, 30)), dtype=torch.float32)
    parts = [x @ x.T, x.T @ x[:, :8], x.sum(0), x.sum(1), x.var(0), x.logsumexp(0), x.lgamma()]
    parts += [f(4 * x) for f in (torch.exp, torch.log, torch.sqrt, torch.tanh, torch.digamma)]
    parts += [x.softmax(1), torch.nn.functional.softplus(x), x.mean(), *torch.linalg.svd(x)]
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()
