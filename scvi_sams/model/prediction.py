"""Simulated cells, and average effects with intervals, of any condition."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
import torch
from scipy import sparse
from scvi.utils import track

from scvi_sams._arguments import checked
from scvi_sams._exceptions import ScreenError
from scvi_sams.model.counterfactual import batch_names, seeded
from scvi_sams.model.read_outs import (
    context_names,
    parse_conditions,
    parse_distinct,
    provenance,
)
from scvi_sams.module.likelihood import expected_expression

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scvi_sams.data import ConditionsLike
    from scvi_sams.model.counterfactual import Basal, Counterfactual, ExpressionScale
    from scvi_sams.model.efficacy import EffectOf
    from scvi_sams.model.samsvae import SAMSVAE


@torch.inference_mode()
def predict(
    model: SAMSVAE,
    conditions: ConditionsLike,
    n_samples: int,
    basal: Basal,
    library_size: float | None,
    batch: str | None,
    return_mean: bool,
    seed: int | None,
    effect: EffectOf,
    context: str | None,
) -> ad.AnnData:
    """See ``SAMSVAE.predict``."""
    model._check_if_trained(warn=False)
    n_samples, return_mean = checked("n_samples", n_samples), checked("return_mean", return_mean)
    asked = parse_distinct(model, conditions)
    labels = asked.labels
    values, layer = [], []
    with seeded(seed, model.device):
        cells = model.counterfactual(
            basal,
            n_samples,
            batch,
            library_size,
            seed=None,
            effect=effect,
            context=context,
        )
        draws = cells.draw(cells.n_cells, asked)
        for row in track(range(len(labels)), description="Predict", disable=len(labels) < 20):
            px = cells.decode(asked, row, draws, one_draw_a_cell=True)
            expected = expected_expression(px).cpu().numpy()
            if return_mean:
                values.append(expected.mean(0, keepdims=True))
                layer.append(expected.std(0, keepdims=True))
            else:
                values.append(sparse.csr_matrix(px.sample().cpu().numpy()))
                layer.append(expected)
    predicted = ad.AnnData(
        np.concatenate(values) if return_mean else sparse.vstack(values, "csr"),
        obs=(
            pd.DataFrame(index=pd.Index(labels, name="condition"))
            if return_mean
            else _predicted_obs(model, labels, cells)
        ),
        var=pd.DataFrame(index=pd.Index(model.get_var_names())),
        layers={"std" if return_mean else "normalized_expression": np.concatenate(layer)},
    )
    predicted.uns["scvi_sams"] = provenance(model, seed)
    return predicted


def _predicted_obs(model: SAMSVAE, labels: list[str], cells: Counterfactual) -> pd.DataFrame:
    """Condition, basal cell, library size and batch of each predicted cell."""
    n_cells, population = cells.n_cells, cells.population
    names = np.arange(n_cells) if cells.cell_names is None else np.asarray(cells.cell_names)
    obs = pd.DataFrame(
        {
            "condition": pd.Categorical(np.repeat(labels, n_cells), categories=labels),
            "basal_cell": np.tile(names, len(labels)),
            "library_size": np.tile(population.library.cpu().numpy().ravel(), len(labels)),
        }
    )
    if population.batch_index is not None:
        codes = population.batch_index.cpu().numpy().ravel()
        batches = np.asarray(batch_names(model))[codes]
        obs["batch"] = pd.Categorical(np.tile(batches, len(labels)))
    if population.context is not None:
        of_cells = np.asarray(context_names(model))[population.context.cpu().numpy().ravel()]
        obs["context"] = pd.Categorical(np.tile(of_cells, len(labels)))
    obs.index = [f"{label}_{k}" for label in labels for k in range(n_cells)]
    return obs


def compared_means(
    model: SAMSVAE,
    conditions: ConditionsLike | None,
    reference: str | dict[str, float] | None,
    n_samples: int,
    scale: ExpressionScale | None,
    cells: Counterfactual,
) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
    """Labels of conditions and reference, and the means over cells of both, draws x genes."""
    n_samples = checked("n_samples", n_samples)
    asked = parse_distinct(model, model.perturbation_names if conditions is None else conditions)
    against = parse_conditions(model, {} if reference is None else reference)
    if len(against.labels) != 1:
        raise ScreenError(f"reference={reference!r} is more than one condition: give one.")
    draws = cells.draw(n_samples, against, asked)
    means = cells.means(against, 0, draws, scale)
    n_conditions = len(asked.labels)
    for row in track(range(n_conditions), description="Effects", disable=n_conditions < 20):
        yield asked.labels[row], against.labels[0], cells.means(asked, row, draws, scale), means


def effect_scale(model: SAMSVAE, method: str | None) -> ExpressionScale:
    """Scale of average effects, checked."""
    is_count_model = model.module.is_count_model
    if method is None:
        return "log_normalized" if is_count_model else "mean"
    if method == "log_normalized":
        if not is_count_model:
            raise ValueError(
                "method='log_normalized' is for counts, and this model has "
                "gene_likelihood='normal'; use method='mean'."
            )
        return "log_normalized"
    if method == "mean":
        return "mean"
    raise ValueError(f"method={method!r} is unknown; use 'log_normalized' or 'mean'.")


def average_treatment_effect(
    model: SAMSVAE,
    conditions: ConditionsLike | None,
    reference: str | dict[str, float] | None,
    scale: ExpressionScale,
    n_samples: int,
    credible_level: float,
    cells: Counterfactual,
) -> ad.AnnData:
    """See ``SAMSVAE.get_average_treatment_effect``."""
    tail = 50 * (1 - credible_level)
    labels = []
    columns: dict[str, list[np.ndarray]] = {"mean": [], "lower": [], "upper": [], "std": []}
    for label, _, means, against in compared_means(
        model, conditions, reference, n_samples, scale, cells
    ):
        labels.append(label)
        effects = means - against
        columns["mean"].append(effects.mean(0))
        if model.module.effects is None:  # no posterior, so nothing to say how sure it is
            effects = np.full_like(effects, np.nan)
        columns["std"].append(effects.std(0))
        lower, upper = np.percentile(effects, [tail, 100 - tail], axis=0)
        columns["lower"].append(lower)
        columns["upper"].append(upper)
    layers = {name: np.stack(rows).astype(np.float32) for name, rows in columns.items()}
    effect = ad.AnnData(
        layers.pop("mean"),
        obs=pd.DataFrame(index=pd.Index(labels, name="condition")),
        var=pd.DataFrame(index=pd.Index(model.get_var_names())),
        layers=layers,
    )
    effect.uns["scvi_sams"] = provenance(model, cells.seed) | {
        "method": scale,
        "credible_level": credible_level,
    }
    return effect
