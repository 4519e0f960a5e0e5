"""Errors of predicted effects in which the genes that respond count more."""

from __future__ import annotations

__all__ = ["differential_expression_weights", "weighted_effect_error"]

from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from scvi_sams._exceptions import ScreenError
from scvi_sams.metrics._effects import _condition_groups, _group_moments
from scvi_sams.metrics._profiles import (
    aligned_profiles,
    profile_frame,
    ratio,
    relative_to,
    row_of_genes,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import anndata as ad
    from numpy.typing import NDArray

    from scvi_sams.metrics._profiles import ProfileTable


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
    >>> weights = scvi_sams.metrics.differential_expression_weights(
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
    >>> from scvi_sams.metrics import weighted_effect_error
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
