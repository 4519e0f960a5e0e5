"""How well predicted average treatment effects agree with observed ones."""

from __future__ import annotations

__all__ = [
    "effect_correlation",
    "effect_correlation_by_condition",
    "perturbed_reference",
    "relative_squared_error",
]

from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd

from scvi_sams._exceptions import ScreenError
from scvi_sams.metrics._profiles import (
    aligned_profiles,
    profile_frame,
    ratio,
    relative_to,
    row_correlation,
    row_of_genes,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from scvi_sams.metrics._profiles import ProfileTable


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
    >>> effect = scvi_sams.metrics.observed_average_treatment_effect(
    ...     adata, perturbation_key="perturbation", control="control"
    ... )
    >>> round(scvi_sams.metrics.effect_correlation(effect[["P002", "P001"]], effect), 6)
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
    >>> effect = scvi_sams.metrics.observed_average_treatment_effect(
    ...     adata, perturbation_key="perturbation", control="control"
    ... )
    >>> scvi_sams.metrics.relative_squared_error(effect, effect)
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
    >>> effect = scvi_sams.metrics.observed_average_treatment_effect(
    ...     adata, perturbation_key="perturbation", control="control"
    ... )
    >>> table = scvi_sams.metrics.effect_correlation_by_condition(effect, effect)
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
    >>> from scvi_sams.metrics import perturbed_reference
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
