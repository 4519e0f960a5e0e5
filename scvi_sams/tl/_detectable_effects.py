"""The smallest effects that a screen would have shown."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.special import ndtri
from scipy.stats import false_discovery_control, norm

from scvi_sams._arguments import checked
from scvi_sams._exceptions import ScreenError
from scvi_sams.data.conditions import Conditions, padded_to_csr
from scvi_sams.data.field import registered_conditions
from scvi_sams.model.counterfactual import COUNTS_PER
from scvi_sams.model.gene_effects import of_each_alone, response_sums
from scvi_sams.model.read_outs import inclusion_and_slab
from scvi_sams.module.gene_effects import ExpressionCurve
from scvi_sams.module.likelihood import expected_log_normalized_expression
from scvi_sams.tl._control_null import null_perturbations
from scvi_sams.tl._mechanisms import mechanisms
from scvi_sams.tl.call_power import (
    bh_threshold,
    calling_problem,
    calling_threshold,
    learned_effects,
    least_effect,
    null_threshold,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from scvi_sams.model import SAMSVAE


_N_STATES = 50  # basal states over which expression is averaged, as of get_gene_effects
_GRID = torch.arange(-8.0, 8.5, 0.5)  # log fold changes, as far as counts per 10,000 reach


def detectable_effects(
    model: SAMSVAE,
    fdr: float = 0.1,
    power: float = 0.8,
    *,
    on: Literal["perturbations", "latents", "genes"] = "perturbations",
) -> pd.DataFrame:
    r"""How large an effect would have to be to be called, so that "nothing above x" is a result.

    **On latents**, what the cells of a perturbation say of an effect :math:`e` is a score
    :math:`s \sim \mathrm{Normal}(c e,\ \phi (c + c^2 / c_0))`. Here :math:`c` is the curvature
    that they give (their number times what counts tell of the latent, at most one a cell),
    :math:`c_0` that of the basal mean, mostly of controls, and :math:`\phi \ge 1` the excess of
    the noise that the scores of all perturbations show, most of which do nothing (an empirical
    null: Efron, Journal of the American Statistical Association 99, 96, 2004). The log-odds of
    the mask are :math:`a + b s^2`, with the prior, the saturation of ``mask_evidence_cells`` and
    the penalty for free latents in :math:`a` and :math:`b`. The mask is called where they reach
    the threshold that :func:`mechanisms` has at this ``fdr``, were there this one effect more.
    That leaves the effect whose score passes with probability ``power``: a quantile of the
    noncentral normal distribution. Nothing is simulated.

    **On genes**, the difference of the mean log expression from controls has a standard error, and
    is called by Benjamini and Hochberg's procedure (1995) over the genes of a perturbation, were
    there one change more than they show. It is turned into a fold change where the model says that
    the gene is. This is the two-sample test of each gene, without help of a latent that moves many
    at once: what a latent shows is smaller.

    The latents are taken as known. That they are learned from the same cells is not in the
    formula; how well its promises hold when cells are thinned is printed by
    ``python -m benchmarks detectable_effects``. Where cells carry several perturbations, the
    effects of the others are taken as known too, which is too good where two are always
    together.

    Parameters
    ----------
    model
        A trained model with masks from closed-form updates.
    fdr
        False discovery rate of the calls.
    power
        Probability that the effect is called.
    on
        What a row is, see below.

    Returns
    -------
    pandas.DataFrame
        With ``on="perturbations"``, a row a perturbation:

        * ``n_cells``: training cells that carry it
        * ``latent_effect``, ``worst_latent_effect``: smallest effect called on the latents that
          perturbations move (all latents if none is moved): the median latent's, and the largest,
          above which no effect on any of them would have been missed, in standard deviations of
          the basal state
        * ``largest_effect``, ``latent``: that the fit found, and where; ``called``: whether a
          mechanism of the perturbation is called
        * of genes, missing without the AnnData: ``log2_fold_change``, the median gene's smallest
          rise that is called, and ``share_twofold``, the share of genes of which a doubling is

        With ``on="latents"``, a row for each perturbation and latent: ``curvature``, ``in_use``
        (whether a perturbation is called on the latent), ``detectable_effect``, ``effect_mean``,
        ``called``. With ``on="genes"``, a row for each perturbation and gene: ``standard_error``
        and ``detectable_difference`` of the mean of ``log2(1 + 1e4 x / library)``, ``difference``
        (observed), ``rise`` and ``fall`` (log2 fold changes, infinite where even the largest would
        not be called) and ``called``. Infinite effects are those that no size would show.

        ``attrs`` holds ``fdr``, ``power`` and, of latents, ``threshold`` (of the log-odds) and
        ``excess_noise`` (:math:`\phi`).

    Raises
    ------
    NotImplementedError
        If the model has no masks, they were learned by gradient, or it is a query; for genes, if
        it is not of counts.
    ScreenError
        If an argument cannot be used; for genes, if there is no AnnData or no control.

    Examples
    --------
    >>> limits = scvi_sams.tl.detectable_effects(model)  # doctest: +SKIP
    >>> limits.query("not called")[["n_cells", "worst_latent_effect"]]  # doctest: +SKIP
    """
    fdr, wanted = checked("fdr", fdr), checked("power", power)
    if on not in ("perturbations", "latents", "genes"):
        raise ScreenError(f"on={on!r} cannot be used: give 'perturbations', 'latents' or 'genes'.")
    if on == "genes":
        _check_genes(model)
        return _of_genes(model, fdr, wanted)
    latents = _of_latents(model, fdr, wanted)
    if on == "latents":
        return latents
    rows = latents.groupby("perturbation", sort=False)
    used = latents[latents["in_use"]].groupby("perturbation", sort=False)["detectable_effect"]
    largest = latents.loc[rows["effect_mean"].apply(lambda e: e.abs().idxmax())]
    largest = largest.set_index("perturbation")
    table = pd.DataFrame(
        {
            "n_cells": rows["n_cells"].first(),
            "latent_effect": used.median(),
            "worst_latent_effect": used.max(),
            "largest_effect": largest["effect_mean"],
            "latent": largest["latent"],
            "called": rows["called"].any(),
        }
    )
    if model.adata is not None and model.module.is_count_model:
        of_gene = _of_genes(model, fdr, wanted).groupby("perturbation", sort=False)
        table["log2_fold_change"] = of_gene["rise"].median()
        table["share_twofold"] = of_gene["rise"].apply(lambda rise: (rise <= 1).mean())
    table.attrs = latents.attrs
    return table


# -- on latents -----------------------------------------------------------------------------------


def _of_latents(model: SAMSVAE, fdr: float, wanted: float) -> pd.DataFrame:
    problem = calling_problem(model, "detectable_effects")
    excess = learned_effects(model, problem).excess
    problem = problem._replace(variance=excess * problem.variance)
    is_null = np.isin(model.perturbation_names, null_perturbations(model.perturbation_names))
    log_odds = inclusion_and_slab(model, "detectable_effects")[1].to_numpy()
    threshold = calling_threshold(log_odds[~is_null], fdr)
    if is_null.any():
        of_null = null_threshold(log_odds[~is_null], log_odds[is_null], fdr)
        threshold = max(threshold, of_null)
    effect = problem.least_effect(threshold, wanted)[~is_null]
    table = mechanisms(model, fdr)[["perturbation", "latent", "effect_mean", "called"]]
    used = table.groupby("latent")["called"].transform("any")
    statistics = model.module.closed_form.statistics
    n_cells = statistics.n_cells(model.module.n_training_cells)[: len(is_null), 0]
    n_cells = n_cells.round().long().cpu().numpy()[~is_null]
    table.insert(2, "n_cells", np.repeat(n_cells, effect.shape[1]))
    table.insert(3, "curvature", problem.curvature[~is_null].ravel())
    table.insert(4, "in_use", used if used.any() else True)
    table.insert(5, "detectable_effect", effect.ravel())
    table.attrs = {"fdr": fdr, "power": wanted, "threshold": threshold, "excess_noise": excess}
    return table


# -- on genes -------------------------------------------------------------------------------------


class _Differences(NamedTuple):
    """Of mean log expression from controls, perturbations x genes."""

    mean: NDArray[np.float64]
    error: NDArray[np.float64]


def _check_genes(model: SAMSVAE) -> None:
    model._check_if_trained(warn=False)
    if not model.module.is_count_model:
        raise NotImplementedError("detectable_effects: genes are of counts; this model has none.")
    if model.adata is None:
        raise ScreenError(
            "What single genes show is in the cells, and the model was loaded without its "
            "AnnData: load it with its AnnData, or ask on='latents'."
        )


def _of_genes(model: SAMSVAE, fdr: float, wanted: float) -> pd.DataFrame:
    found = _differences(model)
    level, curve = _expression(model)
    genes = np.asarray(model.get_var_names())
    nulls = set(null_perturbations(model.perturbation_names))
    tables = []
    for row, name in enumerate(model.perturbation_names):
        if name in nulls:
            continue
        mean, error = found.mean[row], found.error[row]
        p_value = 2 * norm.sf(np.abs(mean / error))
        threshold = bh_threshold(p_value, fdr)
        # A threshold is one p-value, so that the least signal is one number.
        difference = least_effect(-ndtri(threshold / 2), wanted) * error
        tables.append(
            pd.DataFrame(
                {
                    "perturbation": name,
                    "gene": genes,
                    "standard_error": error,
                    "difference": mean,
                    "detectable_difference": difference,
                    "rise": _fold_change(curve, level + difference),
                    "fall": _fold_change(curve, level - difference),
                    "called": false_discovery_control(p_value) <= fdr,
                }
            )
        )
    table = pd.concat(tables, ignore_index=True)
    table.attrs = {"fdr": fdr, "power": wanted}
    return table


def _differences(model: SAMSVAE) -> _Differences:
    conditions = registered_conditions(model.adata_manager)
    n = len(model.perturbation_names)
    doses = padded_to_csr(conditions.index, conditions.dose, n)[conditions.codes]
    cells = (
        np.arange(len(conditions.codes)) if model.train_indices is None else model.train_indices
    )
    cells = np.sort(np.asarray(cells))
    if not conditions.is_control[conditions.codes[cells]].any():
        raise ScreenError("Effects on genes are differences from controls, and there are none.")
    sums = response_sums(model, cells, doses)
    known = np.flatnonzero(sums.coupling.diagonal() > 0)
    mean, error = np.zeros(sums.score.shape), np.full(sums.score.shape, np.inf)
    mean[known] = of_each_alone(sums.score[known], sums.coupling[known][:, known])
    error[known] = sums.errors()[0][known]
    return _Differences(mean, error)


@torch.inference_mode()
def _expression(model: SAMSVAE) -> tuple[NDArray[np.float64], ExpressionCurve]:
    """Mean log expression without a perturbation, by gene, and its curve."""
    cells = model.counterfactual(n_cells=_N_STATES, seed=0)
    nothing = Conditions.from_request({}, model.perturbation_names)
    px = cells.decode(nothing, 0, cells.draw(1, nothing))
    library = cells.population.library
    levels = torch.stack(
        [
            expected_log_normalized_expression(px, library, COUNTS_PER, math.exp(fold))
            .squeeze(0)
            .mean(0)
            .cpu()
            for fold in _GRID.tolist()
        ]
    )
    return levels[_GRID == 0][0].double().numpy(), ExpressionCurve(_GRID, levels)


def _fold_change(curve: ExpressionCurve, level: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log2 fold changes that lead to levels, infinite where nothing does."""
    change = curve.at(torch.from_numpy(level).float().unsqueeze(0))[0].double().numpy()
    is_rise = change >= _GRID[-1].item() - 1e-6
    is_fall = (level <= 0) | (change <= _GRID[0].item() + 1e-6)
    change = np.where(is_fall, -np.inf, np.where(is_rise, np.inf, change / math.log(2)))
    return change
