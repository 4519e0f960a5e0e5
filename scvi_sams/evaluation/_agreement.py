"""Agreement of predicted with observed effects, one row a condition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
from scipy.spatial.distance import cdist
from scipy.stats import norm

from scvi_sams._exceptions import ScreenError
from scvi_sams.data.conditions import split_label
from scvi_sams.data.tables import (
    aligned_profiles,
    profile_frame,
    ratio,
    relative_to,
    row_correlation,
    row_of_genes,
    standard_error_frames,
)
from scvi_sams.evaluation._observed import _condition_groups, _group_moments

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

    from scvi_sams.data.tables import ProfileTable

__all__ = [
    "CollapseIndex",
    "collapse_index",
    "differential_expression_weights",
    "effect_correlation",
    "effect_correlation_by_condition",
    "interval_coverage",
    "perturbation_discrimination",
    "perturbed_reference",
    "relative_squared_error",
    "weighted_effect_error",
]


def effect_correlation(predicted: ProfileTable, observed: ProfileTable) -> float:
    r"""Pearson correlation of predicted and observed effects, over all conditions and genes.

    .. math::

        r = \mathrm{cor}\bigl( (\hat\Delta_{cg})_{c,g},\ (\Delta_{cg})_{c,g} \bigr)

    Parameters
    ----------
    predicted
        Conditions x genes, predicted average treatment effects (``X`` of an AnnData, or a
        DataFrame).
    observed
        Conditions x genes, for instance from :func:`observed_average_treatment_effect`. Must
        have every condition and gene of ``predicted``, in any order; others are not used.

    Returns
    -------
    Correlation between -1 and 1; NaN if either side is constant.

    Raises
    ------
    ScreenError
        If a condition or gene of ``predicted`` is not in ``observed``.

    Notes
    -----
    The measure of Bereket and Karaletsos (NeurIPS 2023). Large effects dominate it; see
    :func:`effect_correlation_by_condition`.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=500)
    >>> effect = scvi_sams.evaluation.observed_average_treatment_effect(
    ...     adata, perturbation_key="perturbation", control="control"
    ... )
    >>> round(scvi_sams.evaluation.effect_correlation(effect[["P002", "P001"]], effect), 6)
    1.0
    """
    values, truth = aligned_profiles(predicted, observed)
    return float(
        row_correlation(values.to_numpy().reshape(1, -1), truth.to_numpy().reshape(1, -1))[0]
    )


def relative_squared_error(predicted: ProfileTable, observed: ProfileTable) -> float:
    r"""Squared error of predicted effects, as a share of the squared observed effects.

    .. math::

        \frac{\sum_{cg} (\hat\Delta_{cg} - \Delta_{cg})^2}{\sum_{cg} \Delta_{cg}^2}

    Predicting no effect at all scores 1. Unlike a correlation it sees the size of the effects.

    Parameters
    ----------
    predicted, observed
        As for :func:`effect_correlation`.

    Returns
    -------
    Error of 0 or more; NaN if all observed effects are 0.

    Raises
    ------
    ScreenError
        As :func:`effect_correlation`.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=500)
    >>> effect = scvi_sams.evaluation.observed_average_treatment_effect(
    ...     adata, perturbation_key="perturbation", control="control"
    ... )
    >>> scvi_sams.evaluation.relative_squared_error(effect, effect)
    0.0
    """
    values, truth = (frame.to_numpy() for frame in aligned_profiles(predicted, observed))
    return float(ratio(np.sum((values - truth) ** 2), np.sum(truth**2)))


def effect_correlation_by_condition(
    predicted: ProfileTable,
    observed: ProfileTable,
    reference: pd.Series | None = None,
    n_top_genes: int = 20,
    ranking: ProfileTable | None = None,
) -> pd.DataFrame:
    r"""Correlation and error of predicted effects, one condition at a time.

    With :math:`\delta_{cg} = \Delta_{cg} - m_g` the observed effects relative to a reference
    :math:`m`, :math:`\hat\delta` the predicted ones, and sums over the genes of a condition,

    .. math::

        \mathrm{pearson} &= \mathrm{cor}_g(\hat\delta_{cg}, \delta_{cg}) \\
        R^2 &= 1 - \frac{\sum_g (\hat\delta_{cg} - \delta_{cg})^2}
            {\sum_g (\delta_{cg} - \bar\delta_c)^2} \\
        \mathrm{relative\ squared\ error} &=
            \frac{\sum_g (\hat\delta_{cg} - \delta_{cg})^2}{\sum_g \delta_{cg}^2}

    Parameters
    ----------
    predicted, observed
        As for :func:`effect_correlation`.
    reference
        Profile :math:`m` that is subtracted from both sides, a Series named by genes; none by
        default, so that effects are against the controls. With :func:`perturbed_reference` of the
        training conditions, what all perturbations have in common earns nothing.
    n_top_genes
        Genes of a condition that count as its strongest.
    ranking
        Conditions x genes, effects against the controls whose absolute values say which genes
        are strongest; ``observed`` by default. Effects of other cells than those scored keep the
        choice from favouring genes whose observed effect is large by chance.

    Returns
    -------
    Table indexed by the conditions of ``predicted``: ``pearson``, ``r2`` (coefficient of
    determination, without bound below) and ``relative_squared_error`` over all genes,
    ``pearson_top`` and ``r2_top`` over the strongest, and ``n_cells`` where ``observed.obs`` has
    it. NaN where a side is constant, or a denominator 0: a prediction that equals the reference
    has no correlation.

    Raises
    ------
    ScreenError
        As :func:`effect_correlation`.
    ValueError
        If ``n_top_genes`` is less than 2.

    Notes
    -----
    Correlation against the mean of the training perturbations ("perturbed reference"): Vinas
    Torne et al., *Systema*, Nature Biotechnology (2025). Pearson and :math:`R^2` over all and the
    20 strongest genes are customary since Lotfollahi et al., Nature Methods 16, 715 (2019).

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=500)
    >>> effect = scvi_sams.evaluation.observed_average_treatment_effect(
    ...     adata, perturbation_key="perturbation", control="control"
    ... )
    >>> table = scvi_sams.evaluation.effect_correlation_by_condition(effect, effect)
    >>> list(table.columns)
    ['pearson', 'r2', 'relative_squared_error', 'pearson_top', 'r2_top', 'n_cells']
    """
    if n_top_genes < 2:
        raise ValueError(f"n_top_genes={n_top_genes}: a correlation needs at least 2 genes.")
    predicted_frame, observed_frame = aligned_profiles(predicted, observed)
    strength = observed_frame
    if ranking is not None:
        _, strength = aligned_profiles(predicted, ranking, "ranking")
    subtracted: NDArray[np.float64] | float = 0.0
    if reference is not None:
        subtracted = row_of_genes(reference, predicted_frame.columns, "reference")
    values, truth = (
        relative_to(predicted_frame, subtracted),
        relative_to(observed_frame, subtracted),
    )
    top = np.argsort(-np.abs(strength.to_numpy()), axis=1, kind="stable")[:, :n_top_genes]
    top_values, top_truth = (np.take_along_axis(each, top, axis=1) for each in (values, truth))
    table = pd.DataFrame(
        {
            "pearson": row_correlation(values, truth),
            "r2": _row_r2(values, truth),
            "relative_squared_error": ratio(
                np.sum((values - truth) ** 2, axis=1), np.sum(truth**2, axis=1)
            ),
            "pearson_top": row_correlation(top_values, top_truth),
            "r2_top": _row_r2(top_values, top_truth),
        },
        index=predicted_frame.index.copy(),
    )
    if isinstance(observed, ad.AnnData) and "n_cells" in observed.obs:
        table["n_cells"] = observed.obs["n_cells"].loc[table.index]
    return table


def perturbed_reference(effects: ProfileTable) -> pd.Series:
    r"""Mean effect of the training perturbations, each weighted alike.

    .. math:: m_g = \frac{1}{|P|} \sum_{p \in P} \Delta_{pg}

    Subtracted from predicted and observed effects (``reference`` of
    :func:`effect_correlation_by_condition`), it takes away what any perturbation of the screen
    does to a cell, which a prediction of the mean gets right as well.

    Parameters
    ----------
    effects
        Conditions x genes, effects that were observed in training cells.

    Returns
    -------
    Mean effect, named by genes, in the units of ``effects``.

    Raises
    ------
    ScreenError
        If there is no condition.

    Notes
    -----
    The mean of perturbation centroids of *Systema* (Vinas Torne et al., Nature Biotechnology
    2025), not the mean of perturbed cells. The control profile cancels: with effects on both
    sides, :math:`\hat\Delta_p - m` is what centred mean expression gives.

    Examples
    --------
    >>> import pandas as pd
    >>> from scvi_sams.evaluation import perturbed_reference
    >>> effects = pd.DataFrame({"GATA1": [1.0, 3.0], "SPI1": [0.0, -1.0]}, index=["A", "B"])
    >>> perturbed_reference(effects).to_dict()
    {'GATA1': 2.0, 'SPI1': -0.5}
    """
    frame = profile_frame(effects, "effects")
    if frame.empty:
        raise ScreenError("`effects` has no condition, so that there is no mean of them.")
    return frame.mean(axis=0).rename("perturbed_reference")


def _row_r2(predicted: NDArray[np.float64], observed: NDArray[np.float64]) -> NDArray[np.float64]:
    variation = np.sum((observed - observed.mean(axis=1, keepdims=True)) ** 2, axis=1)
    # The mean of equal numbers is off by rounding, which is no variation.
    variation[variation <= 1e-24 * np.sum(observed**2, axis=1)] = 0
    return 1 - ratio(np.sum((predicted - observed) ** 2, axis=1), variation)


def differential_expression_weights(
    adata: ad.AnnData,
    perturbation_key: str,
    control: str | Sequence[str],
    against: Literal["rest", "control"] = "rest",
    layer: str | None = None,
    size_factor_key: str | None = None,
    conditions: Sequence[str] | None = None,
    scale: float = 1e4,
    min_cells: int = 2,
) -> pd.DataFrame:
    r"""Weights of genes from differential expression, for :func:`weighted_effect_error`.

    With :math:`t_{cg}` the t statistic of Welch between the cells of condition :math:`c` and all
    others (or the controls), in :math:`\log_2(1 + \mathrm{scale} \cdot x / l)`,

    .. math::

        w_{cg} = \left( \frac{|t_{cg}| - \min_h |t_{ch}|}{\max_h |t_{ch}| - \min_h |t_{ch}|}
            \right)^2

    so that the gene that responds most weighs 1 and the one that responds least 0.

    Parameters
    ----------
    adata
        Cells x genes, with counts. **Give other cells than those the prediction is compared
        with**: weights of the same cells single out the genes whose noise is largest.
    perturbation_key, control, layer, size_factor_key, conditions, scale
        As for :func:`observed_average_treatment_effect`.
    against
        ``"rest"``: all other cells with a label, controls too. ``"control"``: the controls.
    min_cells
        Conditions with fewer cells are left out; a variance takes 2.

    Returns
    -------
    Weights between 0 and 1, conditions x genes. All 1 where no gene differs from another.

    Raises
    ------
    ScreenError
        As :func:`observed_average_treatment_effect`.
    ValueError
        If ``against`` is unknown, or ``min_cells`` less than 2.

    Notes
    -----
    Mejia et al., *Diversity by Design* (arXiv 2506.22641), who take one half of the cells of a
    condition for the weights and score the other. That the statistic is Welch's is our choice.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=500)
    >>> weights = scvi_sams.evaluation.differential_expression_weights(
    ...     adata[::2], perturbation_key="perturbation", control="control"
    ... )
    >>> float(weights.loc["P001"].max())
    1.0
    """
    if against not in {"rest", "control"}:
        raise ValueError(f"against={against!r} is unknown; use 'rest' or 'control'.")
    if min_cells < 2:
        raise ValueError(f"min_cells={min_cells}: a variance takes at least 2 cells.")
    groups = _condition_groups(adata, perturbation_key, control, conditions, min_cells)
    mean, variance = _group_moments(adata, groups, layer, size_factor_key, scale)
    own = slice(1, len(groups.conditions) + 1)
    n_cells = groups.n_cells[:, None].astype(float)
    if against == "control":
        other_mean, other_variance, n_other = mean[:1], variance[:1], n_cells[:1]
    else:
        squares = np.nan_to_num(variance) * (n_cells - 1) + n_cells * mean**2
        squares[groups.n_cells == 0] = 0
        n_other = n_cells.sum() - n_cells[own]
        other_mean = ((n_cells * mean).sum(axis=0) - n_cells[own] * mean[own]) / n_other
        deviations = squares.sum(axis=0) - squares[own] - n_other * other_mean**2
        other_variance = np.maximum(deviations, 0) / np.maximum(n_other - 1, 1)
    squared_error = variance[own] / n_cells[own] + np.nan_to_num(other_variance) / n_other
    error = np.sqrt(squared_error)
    score = np.nan_to_num(np.abs(ratio(mean[own] - other_mean, error)))
    lowest = score.min(axis=1, keepdims=True)
    spread = score.max(axis=1, keepdims=True) - lowest
    weights = np.where(spread > 0, (score - lowest) / np.where(spread > 0, spread, 1), 1.0) ** 2
    return pd.DataFrame(weights, index=groups.conditions, columns=adata.var_names)


def weighted_effect_error(
    predicted: ProfileTable,
    observed: ProfileTable,
    weights: ProfileTable,
    reference: pd.Series | None = None,
) -> pd.DataFrame:
    r"""Weighted squared error and weighted R squared of predicted effects, by condition.

    With :math:`\delta_{cg} = \Delta_{cg} - m_g` the observed effects relative to a reference,
    :math:`\hat\delta` the predicted ones, :math:`w` the weights and
    :math:`\bar\delta_c = \sum_g w_{cg} \delta_{cg} / \sum_g w_{cg}`,

    .. math::

        \mathrm{WMSE}_c = \frac{\sum_g w_{cg} (\hat\delta_{cg} - \delta_{cg})^2}{\sum_g w_{cg}},
        \qquad
        R^2_{w,c} = 1 - \frac{\sum_g w_{cg} (\hat\delta_{cg} - \delta_{cg})^2}
            {\sum_g w_{cg} (\delta_{cg} - \bar\delta_c)^2}.

    Parameters
    ----------
    predicted, observed
        As for :func:`effect_correlation`.
    weights
        Conditions x genes, 0 or more, with every condition and gene of ``predicted``; see
        :func:`differential_expression_weights`.
    reference
        Profile that is subtracted from both sides, a Series named by genes; none by default. The
        source takes the mean of the perturbations, as from :func:`perturbed_reference`. It does
        not change the squared error.

    Returns
    -------
    Table indexed by the conditions of ``predicted``, with ``weighted_mse`` (squared units of the
    effects) and ``weighted_r2`` (1 at best, without bound below). NaN where all weights are 0.

    Raises
    ------
    ScreenError
        If tables do not match, or a weight is negative or not finite.

    Notes
    -----
    WMSE and :math:`R^2_w(\Delta)` of Mejia et al., *Diversity by Design* (arXiv 2506.22641).

    Examples
    --------
    >>> import pandas as pd
    >>> from scvi_sams.evaluation import weighted_effect_error
    >>> observed = pd.DataFrame({"GATA1": [2.0], "SPI1": [0.0], "MYC": [0.0]}, index=["A"])
    >>> weights = pd.DataFrame({"GATA1": [1.0], "SPI1": [0.5], "MYC": [0.0]}, index=["A"])
    >>> weighted_effect_error(0.5 * observed, observed, weights)["weighted_mse"].round(3).to_dict()
    {'A': 0.667}
    """
    predicted_frame, observed_frame = aligned_profiles(predicted, observed)
    _, weight_frame = aligned_profiles(predicted, profile_frame(weights, "weights"), "weights")
    weight = weight_frame.to_numpy()
    if (bad := ~(np.isfinite(weight) & (weight >= 0)).all(axis=1)).any():
        raise ScreenError(
            f"`weights` of {weight_frame.index[bad.argmax()]!r} must be finite and 0 or more."
        )
    subtracted: NDArray[np.float64] | float = 0.0
    if reference is not None:
        subtracted = row_of_genes(reference, predicted_frame.columns, "reference")
    values, truth = (
        relative_to(predicted_frame, subtracted),
        relative_to(observed_frame, subtracted),
    )
    total = weight.sum(axis=1)
    error = np.sum(weight * (values - truth) ** 2, axis=1)
    centre = ratio(np.sum(weight * truth, axis=1), total)[:, None]
    variation = np.sum(weight * (truth - centre) ** 2, axis=1)
    # The mean of equal numbers is off by rounding, which is no variation.
    variation[variation <= 1e-24 * np.sum(weight * truth**2, axis=1)] = 0
    return pd.DataFrame(
        {"weighted_mse": ratio(error, total), "weighted_r2": 1 - ratio(error, variation)},
        index=predicted_frame.index.copy(),
    )


_DISTANCES = {"l1": "cityblock", "l2": "euclidean", "cosine": "cosine"}


def perturbation_discrimination(
    predicted: ProfileTable,
    observed: ProfileTable,
    metric: Literal["l1", "l2", "cosine"] = "l1",
    exclude_target_genes: bool = True,
    combination_delimiter: str | None = "+",
) -> pd.Series:
    r"""Perturbation discrimination score (PDS) of each predicted condition.

    With :math:`N` observed conditions and :math:`d` the distance between effects,

    .. math::

        \mathrm{PDS}_p = 1 - \frac{1}{N} \sum_{q \ne p} \left(
            \mathbf 1[d(\hat\Delta_p, \Delta_q) < d(\hat\Delta_p, \Delta_p)]
            + \tfrac12\, \mathbf 1[d(\hat\Delta_p, \Delta_q) = d(\hat\Delta_p, \Delta_p)] \right).

    It is 1 where a prediction is nearest to what it predicts. One and the same prediction for all
    conditions has a mean of :math:`(N + 1) / 2N`, as has one that is unrelated, on average.

    Parameters
    ----------
    predicted
        Conditions x genes, predicted effects.
    observed
        Conditions x genes, observed effects: every condition of ``predicted``, and those it may
        be confused with. Scores of different sets of conditions do not compare.
    metric
        Distance: ``"l1"``, ``"l2"`` (both change with the scale of the predictions) or
        ``"cosine"`` (does not).
    exclude_target_genes
        Leave out the genes a condition is named after: a target that was knocked out tells on
        itself.
    combination_delimiter
        What joins the parts of a condition; None takes every name as one part.

    Returns
    -------
    Score of each condition of ``predicted``, named ``"perturbation_discrimination"``; NaN where a
    prediction is not finite, or a distance not defined (``"cosine"`` of no effect at all).

    Raises
    ------
    ScreenError
        If a condition or gene of ``predicted`` is not in ``observed``, or a value of ``observed``
        is not finite.
    ValueError
        If ``metric`` is unknown.

    Notes
    -----
    The score of the Virtual Cell Challenge (Roohani et al., Cell 2025) as
    `cell-eval <https://github.com/ArcInstitute/cell-eval>`_ computes it
    (``discrimination_score_l1``), with two differences: ties share their rank, so that the order
    of conditions earns nothing, and the targets of combinations are left out as well.

    Examples
    --------
    >>> import pandas as pd
    >>> from scvi_sams.evaluation import perturbation_discrimination
    >>> effects = pd.DataFrame({"GATA1": [1.0, 3.0], "SPI1": [0.0, -1.0]}, index=["A", "B"])
    >>> perturbation_discrimination(0.8 * effects, effects).to_dict()
    {'A': 1.0, 'B': 1.0}
    >>> perturbation_discrimination(effects[::-1].set_index(effects.index), effects).to_dict()
    {'A': 0.5, 'B': 0.5}
    """
    if metric not in _DISTANCES:
        raise ValueError(f"metric={metric!r} is unknown; use one of {', '.join(_DISTANCES)}.")
    values, _ = aligned_profiles(predicted, observed)
    truth = profile_frame(observed, "observed")[values.columns]
    if not (finite := np.isfinite(truth).all(axis=1)).all():
        raise ScreenError(
            f"`observed` effects of {truth.index[finite.argmin()]!r} are not finite: leave it out."
        )
    genes, matrix = truth.columns, truth.to_numpy()
    scores = np.full(len(values), np.nan)
    own_rows = truth.index.get_indexer(values.index)
    for row, (condition, own) in enumerate(zip(values.index, own_rows, strict=True)):
        prediction = values.iloc[[row]].to_numpy()
        candidates = matrix
        if exclude_target_genes:
            targets = genes.isin(split_label(str(condition), combination_delimiter))
            if targets.any():
                prediction, candidates = prediction[:, ~targets], matrix[:, ~targets]
        distance = cdist(prediction, candidates, _DISTANCES[metric])[0]
        if np.isnan(distance[own]):
            continue
        closer = (distance < distance[own]).sum() + ((distance == distance[own]).sum() - 1) / 2
        scores[row] = 1 - closer / len(truth)
    return pd.Series(scores, index=values.index.copy(), name="perturbation_discrimination")


class CollapseIndex(NamedTuple):
    """Variance of predictions across conditions against the observed; see :func:`collapse_index`.

    Variances are sums over genes, in squared units of the tables.
    """

    ratio: float
    """Predicted variance over the observed one, noise and all."""
    noise_corrected_ratio: float
    """Predicted variance over the observed one less its sampling variance."""
    predicted_variance: float
    """Variance of the predictions."""
    observed_variance: float
    """Variance of the observations, of which noise is a part."""
    sampling_variance: float
    """What the observed variance owes to the limited number of cells; NaN without errors."""


def collapse_index(
    predicted: ProfileTable,
    observed: ProfileTable,
    standard_error: ProfileTable | str | None = "standard_error",
) -> CollapseIndex:
    r"""Variance of predictions across conditions, as a share of the observed variance.

    .. math::

        \mathrm{ratio} = \frac{\sum_g \mathrm{Var}_c(\hat x_{cg})}{\sum_g \mathrm{Var}_c(x_{cg})},
        \qquad
        \mathrm{noise\ corrected} = \frac{\sum_g \mathrm{Var}_c(\hat x_{cg})}
            {\sum_g \mathrm{Var}_c(x_{cg}) - \sum_g \frac1C \sum_c \sigma_{cg}^2}

    with :math:`\mathrm{Var}_c` the variance over the :math:`C` conditions (denominator
    :math:`C - 1`) and :math:`\sigma_{cg}` the standard error of the mean of the cells of a
    condition. 0 is a prediction that is the same for all perturbations (collapse), 1 one that is
    as diverse as the truth. It does not say that the diversity is right.

    Observed means are noisy, and with few cells most of their variance is noise. A perfect
    prediction of the expectations then has a ratio below 1, and a noise-corrected ratio of 1.
    The prediction is taken as it is: a mean of few cells has noise of its own.

    Parameters
    ----------
    predicted, observed
        Conditions x genes, effects or mean expression; ``observed`` has every condition and gene
        of ``predicted``.
    standard_error
        Standard errors of the observed values: a layer of ``observed``, or a table. The part of
        the controls, in ``observed.var["control_standard_error"]`` if at all, is taken out, as
        what all conditions share has no variance between them. None does not correct.

    Returns
    -------
    Both ratios and the variances they are made of. A ratio is NaN if its denominator is not
    positive.

    Raises
    ------
    ScreenError
        If tables do not match, there are fewer than two conditions, or standard errors are
        missing.

    Notes
    -----
    The measure is ours, after the collapse to the mean that Mejia et al. (arXiv 2506.22641) and
    Wu et al., *PerturBench* (arXiv 2408.10609) describe.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=500)
    >>> effect = scvi_sams.evaluation.observed_average_treatment_effect(
    ...     adata, perturbation_key="perturbation", control="control", min_cells=2
    ... )
    >>> round(scvi_sams.evaluation.collapse_index(effect, effect).ratio, 6)
    1.0
    >>> mean = effect.copy()
    >>> mean.X[:] = effect.X.mean(axis=0)
    >>> round(scvi_sams.evaluation.collapse_index(mean, effect).ratio, 6)
    0.0
    """
    values, truth = aligned_profiles(predicted, observed)
    if len(values) < 2:
        raise ScreenError(f"`predicted` has {len(values)} conditions: a variance takes 2.")
    predicted_variance = float(np.var(values.to_numpy(), axis=0, ddof=1).sum())
    observed_variance = float(np.var(truth.to_numpy(), axis=0, ddof=1).sum())
    sampling_variance = float("nan")
    if standard_error is not None:
        errors, control = standard_error_frames(observed, standard_error, truth)
        own = np.maximum(errors.to_numpy() ** 2 - control**2, 0)
        sampling_variance = float(own.mean(axis=0).sum())
    return CollapseIndex(
        ratio=_quotient(predicted_variance, observed_variance),
        noise_corrected_ratio=_quotient(predicted_variance, observed_variance - sampling_variance),
        predicted_variance=predicted_variance,
        observed_variance=observed_variance,
        sampling_variance=sampling_variance,
    )


def _quotient(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else float("nan")


def interval_coverage(
    predicted: ProfileTable | Mapping[float, ad.AnnData],
    observed: ProfileTable,
    levels: Sequence[float] = (0.5, 0.8, 0.95),
    draws: ArrayLike | None = None,
    standard_error: ProfileTable | str | None = "standard_error",
    seed: int = 0,
) -> pd.DataFrame:
    r"""Share of the observed values of a condition that lie in its predicted intervals.

    With :math:`[a_{cg}, b_{cg}]` the central interval of level :math:`\alpha`,

    .. math::

        \mathrm{coverage}_c(\alpha) = \frac1G \sum_g \mathbf 1[a_{cg} \le x_{cg} \le b_{cg}],

    which is :math:`\alpha` on average if the intervals are right.

    An interval of the expectation need not hold a mean of few cells, which differs from the
    expectation by its standard error :math:`\sigma_{cg}`. So noise is added to the prediction: to
    draws a draw from :math:`\mathcal N(0, \sigma_{cg}^2)` each; to intervals by widening them
    about their middle as those of Normal distributions: half the width :math:`h` becomes
    :math:`\sqrt{h^2 + z_\alpha^2 \sigma_{cg}^2}`, with :math:`z_\alpha` the Normal quantile.

    Parameters
    ----------
    predicted
        Conditions x genes. Without ``draws``: an AnnData with ``layers["lower"]``,
        ``layers["upper"]`` and their level in ``uns["scvi_sams"]["credible_level"]``, as from
        ``model.get_average_treatment_effect``; or a mapping from levels to such tables. With
        ``draws`` it names their conditions and genes.
    observed
        Conditions x genes, with every condition and gene of ``predicted``.
    levels
        Levels of the central intervals of ``draws``. Not used without: each table has its own.
    draws
        Samples x conditions x genes, draws from the posterior of the same quantity.
    standard_error
        Standard errors of the observed values: a layer of ``observed``, or a table. None compares
        with the observed values as if they were expectations, which understates coverage.
    seed
        Seed of the noise that is added to draws.

    Returns
    -------
    Table of conditions x levels (columns named by the level).

    Raises
    ------
    ScreenError
        If tables do not match, or one lacks its intervals, their level, or standard errors.
    ValueError
        If a level is not between 0 and 1, or draws have the wrong shape.

    Notes
    -----
    Errors of one gene in two conditions are correlated through their common controls: the mean of
    coverage over conditions is as it should be, its spread larger than that of independent trials.

    Examples
    --------
    >>> import numpy as np
    >>> import pandas as pd
    >>> from scvi_sams.evaluation import interval_coverage
    >>> rng = np.random.default_rng(0)
    >>> predicted = pd.DataFrame(np.zeros((1, 2000)), index=["A"]).add_prefix("gene_")
    >>> truth = predicted + rng.normal(size=(1, 2000))
    >>> draws = rng.normal(size=(1000, 1, 2000))
    >>> coverage = interval_coverage(predicted, truth, draws=draws, standard_error=None)
    >>> coverage.round(2).to_dict("records")
    [{0.5: 0.49, 0.8: 0.8, 0.95: 0.95}]
    """
    if draws is not None:
        if isinstance(predicted, Mapping):
            raise ValueError("`predicted` must be one table when there are `draws`.")
        return _draws_coverage(predicted, observed, levels, draws, standard_error, seed)
    if isinstance(predicted, Mapping):
        tables = dict(predicted)
    else:
        tables = {_credible_level(predicted): predicted}
    columns = {}
    for level, table in tables.items():
        _check_level(level)
        columns[level] = _table_coverage(table, observed, level, standard_error)
    return pd.DataFrame(columns).rename_axis(columns="level")


def _draws_coverage(
    predicted: ProfileTable,
    observed: ProfileTable,
    levels: Sequence[float],
    draws: ArrayLike,
    standard_error: ProfileTable | str | None,
    seed: int,
) -> pd.DataFrame:
    values, truth = aligned_profiles(predicted, observed)
    samples = np.asarray(draws, dtype=np.float64)
    if samples.ndim != 3 or samples.shape[1:] != values.shape or not len(samples):
        raise ValueError(
            f"`draws` has shape {samples.shape}: it must be samples x {values.shape[0]} "
            f"conditions x {values.shape[1]} genes, as `predicted`."
        )
    if standard_error is not None:
        errors, _ = standard_error_frames(observed, standard_error, truth)
        noise = np.random.default_rng(seed).normal(size=samples.shape)
        samples = samples + noise * errors.to_numpy()
    columns = {}
    for level in levels:
        _check_level(level)
        lower, upper = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=0)
        columns[level] = _share_inside(truth, lower, upper)
    return pd.DataFrame(columns, index=values.index.copy()).rename_axis(columns="level")


def _table_coverage(
    table: ProfileTable,
    observed: ProfileTable,
    level: float,
    standard_error: ProfileTable | str | None,
) -> pd.Series:
    values, truth = aligned_profiles(table, observed)
    lower, upper = (
        profile_frame(table, "predicted", layer=end).to_numpy() for end in ("lower", "upper")
    )
    if standard_error is not None:
        errors, _ = standard_error_frames(observed, standard_error, truth)
        noise = norm.ppf((1 + level) / 2) * errors.to_numpy()
        middle, half_width = (lower + upper) / 2, np.hypot((upper - lower) / 2, noise)
        lower, upper = middle - half_width, middle + half_width
    share = _share_inside(truth, lower, upper)
    return pd.Series(share, index=values.index)


def _share_inside(
    truth: pd.DataFrame, lower: NDArray[np.float64], upper: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Share of the genes inside; NaN for a condition without intervals."""
    share = ((lower <= truth) & (truth <= upper)).to_numpy().mean(axis=1)
    return np.where(np.isfinite(lower + upper).all(axis=1), share, np.nan)


def _credible_level(predicted: ProfileTable) -> float:
    uns = predicted.uns if isinstance(predicted, ad.AnnData) else {}
    if "credible_level" not in uns.get("scvi_sams", {}):
        raise ScreenError(
            "`predicted` does not say what the level of its intervals is: pass a mapping from the "
            "level to the table, such as {0.95: predicted}, or `draws`."
        )
    return float(uns["scvi_sams"]["credible_level"])


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"The level {level!r} must be between 0 and 1.")
