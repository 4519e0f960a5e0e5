"""Whether predictions differ between perturbations as much as observations do."""

from __future__ import annotations

__all__ = ["CollapseIndex", "collapse_index"]

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from scvi_sams._exceptions import ScreenError
from scvi_sams.metrics._profiles import aligned_profiles, standard_error_frames

if TYPE_CHECKING:
    from scvi_sams.metrics._profiles import ProfileTable


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
    >>> effect = scvi_sams.metrics.observed_average_treatment_effect(
    ...     adata, perturbation_key="perturbation", control="control", min_cells=2
    ... )
    >>> round(scvi_sams.metrics.collapse_index(effect, effect).ratio, 6)
    1.0
    >>> mean = effect.copy()
    >>> mean.X[:] = effect.X.mean(axis=0)
    >>> round(scvi_sams.metrics.collapse_index(mean, effect).ratio, 6)
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
