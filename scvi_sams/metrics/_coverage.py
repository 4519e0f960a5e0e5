"""Whether predicted intervals hold what was observed as often as they claim."""

from __future__ import annotations

__all__ = ["interval_coverage"]

from collections.abc import Mapping
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
from scipy.stats import norm

from scvi_sams._exceptions import ScreenError
from scvi_sams.metrics._profiles import aligned_profiles, profile_frame, standard_error_frames

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

    from scvi_sams.metrics._profiles import ProfileTable


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
    >>> from scvi_sams.metrics import interval_coverage
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
