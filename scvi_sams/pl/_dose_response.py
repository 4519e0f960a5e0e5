"""How much of its full effect a perturbation has at each dose."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats
from scipy.special import expit

from scvi_sams._exceptions import listed
from scvi_sams.pl._figure import (
    BAND_ALPHA,
    CATEGORICAL_COLORS,
    LINE_WIDTH,
    axes_or_new,
    check_table,
    legend_beside,
    literal,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

_BEYOND = 3.0  # times the largest, and below the smallest, measured dose
_DECADES = 10.0  # times the EC50, on both sides, where no dose is known
_N_QUANTILES = 64  # of each of the two parameters


def dose_response(
    curves: pd.DataFrame,
    measured: pd.DataFrame | None = None,
    credible_level: float = 0.95,
    ax: Axes | None = None,
) -> Axes:
    r"""Plot the Hill curves of perturbations, with intervals.

    The share of its full shift that a perturbation has at dose :math:`d` is
    :math:`d^h / (d^h + \mathrm{EC50}^h)`. Its interval at each dose follows from the posterior of
    EC50 and slope :math:`h`, which are independent and log-normal.

    Parameters
    ----------
    curves
        One to eight rows of :func:`~scvi_sams.tl.dose_response`, named by perturbation.
    measured
        Smallest and largest dose that was measured, in columns ``min`` and ``max``, by
        perturbation: ``adata.obs.groupby("perturbation")["dose"].agg(["min", "max"])`` if no cell
        received more than one.
    credible_level
        Level of the intervals in ``curves``.
    ax
        Axes to draw into; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
        The axes, with the dose on a logarithmic x axis. A dot is at the EC50. Curves are solid
        between the doses that were measured and dashed beyond; where none is known, they are
        solid.

    Raises
    ------
    ValueError
        If there are more perturbations than colours, or none, columns are missing, a measured
        dose is not positive, or ``credible_level`` is not between 0 and 1.

    Examples
    --------
    >>> import pandas as pd, scvi_sams
    >>> curves = pd.DataFrame(
    ...     {"ec50": 1.0, "ec50_lower": 0.5, "ec50_upper": 2.0}
    ...     | {"slope": 1.5, "slope_lower": 1.0, "slope_upper": 2.2},
    ...     index=["KLF1"],
    ... )
    >>> measured = pd.DataFrame({"min": 0.1, "max": 10.0}, index=["KLF1"])
    >>> ax = scvi_sams.pl.dose_response(curves, measured)
    """
    if not 1 <= len(curves) <= len(CATEGORICAL_COLORS):
        raise ValueError(
            f"{len(curves)} perturbations: choose 1 to {len(CATEGORICAL_COLORS)} with "
            "curves.loc[[...]], and draw others into axes of their own."
        )
    if not 0 < credible_level < 1:
        raise ValueError(f"credible_level={credible_level} is not between 0 and 1.")
    needed = [f"{name}{end}" for name in ("ec50", "slope") for end in ("", "_lower", "_upper")]
    check_table(curves, needed, "`curves` has no column", "dose_response")
    low, high = curves["ec50"].min() / _DECADES, curves["ec50"].max() * _DECADES
    known = {} if measured is None else measured[["min", "max"]].to_dict("index")
    known = {name: known[name] for name in curves.index if name in known}
    if wrong := [name for name, dose in known.items() if not 0 < dose["min"] <= dose["max"]]:
        raise ValueError(
            f"`measured` has no positive range of doses for {listed(wrong)}: leave out cells "
            "without a dose."
        )
    if known:
        low = min(dose["min"] for dose in known.values()) / _BEYOND
        high = max(dose["max"] for dose in known.values()) * _BEYOND
    doses = np.geomspace(low, high, 200)

    ax = axes_or_new(ax, (5.6, 3.6))
    band = min(BAND_ALPHA, 2 * BAND_ALPHA / len(curves))  # many lie over each other
    for color, (name, row) in zip(CATEGORICAL_COLORS, curves.iterrows(), strict=False):
        lower, upper = _response_interval(doses, row, credible_level)
        ax.fill_between(doses, lower, upper, color=color, alpha=band, linewidth=0)
        response = expit(row["slope"] * np.log(doses / row["ec50"]))
        ends = known.get(name, {"min": low, "max": high})
        inside = (doses >= ends["min"]) & (doses <= ends["max"])
        ax.plot(doses, response, color=color, linewidth=0.7 * LINE_WIDTH, linestyle=(0, (3, 2)))
        ec50 = f"{row['ec50']:.2g} [{row['ec50_lower']:.2g}, {row['ec50_upper']:.2g}]"
        inner = np.where(inside, response, np.nan)
        label = f"{literal(name)}: {ec50}"
        ax.plot(doses, inner, color=color, linewidth=1.3 * LINE_WIDTH, label=label)
        if low <= row["ec50"] <= high:
            dot: dict[str, Any] = {
                "markersize": 5,
                "mec": "white",
                "markeredgewidth": 0.7,
            }
            ax.plot(row["ec50"], 0.5, "o", color=color, zorder=4, **dot)
    ax.set(xscale="log", xlim=(low, high), ylim=(-0.02, 1.02))
    ax.set_xlabel("dose")
    ax.set_ylabel("share of the full shift")
    legend_beside(ax, f"EC50 [{credible_level:.0%} interval]")
    return ax


def _response_interval(
    doses: NDArray[np.floating], row: pd.Series, credible_level: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ends of the interval of the response at each dose, by a grid of equally likely values."""
    grid = stats.norm.ppf((np.arange(_N_QUANTILES) + 0.5) / _N_QUANTILES)
    width = 2 * stats.norm.ppf(0.5 + credible_level / 2)
    log_ec50, log_slope = (
        np.log(row[name]) + grid * np.log(row[f"{name}_upper"] / row[f"{name}_lower"]) / width
        for name in ("ec50", "slope")
    )
    excess = np.log(doses)[:, None] - log_ec50
    logits = np.exp(log_slope)[:, None] * excess[:, None]
    tail = 50 * (1 - credible_level)
    lower, upper = np.percentile(expit(logits).reshape(len(doses), -1), [tail, 100 - tail], axis=1)
    return lower, upper
