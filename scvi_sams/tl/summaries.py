"""Draws of effects on genes, summed up gene by gene or along a target."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import ndtr

from scvi_sams._arguments import checked
from scvi_sams.model.read_outs import check_level
from scvi_sams.tl.error_rates import bayesian_q_value

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


_EPSILON = 1e-8  # of the Bayes factor, as in scvi-tools


class EffectSummary(NamedTuple):
    """Summary of draws of the effect on each gene, each of shape ``(n_genes,)``."""

    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    sign_rate: NDArray[np.float64]
    """Share of the draws with the sign of the mean; 0 where the mean is 0."""


def summarize_effects(effects: NDArray[np.floating], credible_level: float) -> EffectSummary:
    """Mean, spread, central interval and sign rate of draws x genes."""
    check_level(credible_level)
    draws = np.asarray(effects, dtype=np.float64)
    mean = draws.mean(axis=0)
    tail = 50 * (1 - credible_level)
    lower, upper = np.percentile(draws, [tail, 100 - tail], axis=0)
    sign_rate = ((np.sign(draws) == np.sign(mean)) & (mean != 0)).mean(axis=0)
    return EffectSummary(mean, draws.std(axis=0), lower, upper, sign_rate)


def total_variance_share(
    values: NDArray[np.floating], values_redrawn: NDArray[np.floating]
) -> float:
    r"""Share of a variance, summed over genes, that would go if an input were held fixed.

    Sobol's total-effect index by Jansen's estimator (Computer Physics Communications 117, 35,
    1999), :math:`\sum_g \tfrac12\, \mathrm E\,(y_g(z) - y_g(z'))^2 / \sum_g \mathrm{Var}\,
    y_g(z)`, from draws x genes at :math:`z` and at :math:`z'`, whose input is drawn anew. Over all
    inputs it adds up to 1 for a linear function and to more where inputs act together.
    """
    total = float(np.var(values, axis=0, dtype=np.float64).sum())
    if total == 0:
        return 0.0
    change = np.asarray(values, dtype=np.float64) - values_redrawn
    return float(0.5 * np.square(change).mean(axis=0).sum() / total)


def along_target(
    effects: NDArray[np.floating],
    target: NDArray[np.float64],
    error: NDArray[np.float64] | None,
    credible_level: float,
) -> dict[str, float]:
    """How far draws x genes of effects go along a target, and which way.

    The target, by gene, is NaN for genes that do not count; its standard error is ``None`` where
    it is known.
    """
    counts = np.isfinite(target)
    draws, target = np.asarray(effects, np.float64)[:, counts], target[counts]
    product, length = draws @ target, np.linalg.norm(target)
    size = np.linalg.norm(draws, axis=1) * length
    towards, away = (product > 0).astype(float), (product < 0).astype(float)
    if error is not None:
        spread = np.sqrt(draws**2 @ error[counts] ** 2)
        unsure = spread > 0
        towards[unsure] = ndtr(product[unsure] / spread[unsure])
        away[unsure] = 1 - towards[unsure]
    tail = 50 * (1 - credible_level)
    lower, upper = np.percentile(product / length, [tail, 100 - tail])
    cosine = np.divide(product, size, out=np.zeros_like(product), where=size > 0)
    return {
        "score": float(product.mean() / length),
        "score_lower": float(lower),
        "score_upper": float(upper),
        "similarity": float(cosine.mean()),
        "sign": 1 if towards.mean() >= away.mean() else -1,
        "probability": float(towards.mean()),
        "probability_away": float(away.mean()),
    }


def differential_expression_table(
    lfc: NDArray[np.floating],
    genes: Sequence[str] | NDArray[np.str_],
    delta: float = 0.25,
    fdr: float = 0.05,
    credible_level: float = 0.95,
) -> pd.DataFrame:
    """Calls from draws x genes of a log2 fold change, a row a gene; columns as in scvi-tools."""
    draws = np.asarray(lfc, dtype=np.float64)
    if draws.ndim != 2 or len(draws) == 0 or draws.shape[1] != len(genes):
        raise ValueError(
            f"lfc of shape {draws.shape} must be draws x genes, with one draw or more of "
            f"{len(genes)} genes."
        )
    delta, fdr = checked("delta", delta), checked("fdr", fdr)
    summary = summarize_effects(draws, credible_level)
    proba_de = (np.abs(draws) >= delta).mean(axis=0)
    other_sign = np.minimum((draws <= 0).mean(axis=0), (draws >= 0).mean(axis=0))
    q_value = bayesian_q_value(pd.DataFrame({"proba_de": proba_de}))["proba_de"].to_numpy()
    return pd.DataFrame(
        {
            "proba_de": proba_de,
            "proba_not_de": 1 - proba_de,
            "bayes_factor": np.log(proba_de + _EPSILON) - np.log(1 - proba_de + _EPSILON),
            "lfc_mean": summary.mean,
            "lfc_median": np.median(draws, axis=0),
            "lfc_std": summary.std,
            "lfc_min": draws.min(axis=0),
            "lfc_max": draws.max(axis=0),
            "lfc_lower": summary.lower,
            "lfc_upper": summary.upper,
            "lfsr": other_sign,
            "q_value": q_value,
            f"is_de_fdr_{fdr}": q_value <= fdr,
        },
        index=pd.Index(genes),
    )
