"""How much of its full effect a perturbation has at each dose."""

from __future__ import annotations

__all__ = ["dose_response"]

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse, stats
from scipy.special import expit

from scvi_sams._exceptions import unknown_perturbations
from scvi_sams.data.field import registered_dosage
from scvi_sams.pl._figure import (
    BAND_ALPHA,
    CATEGORICAL_COLORS,
    LINE_WIDTH,
    axes_or_new,
    open_frame,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray
    from scvi.model.base import BaseModelClass

_SHOWN = 4  # perturbations by default; more bands than these hide each other
_BEYOND = 3.0  # times the largest, and below the smallest, measured dose
_DECADES = 10.0  # times the EC50, on both sides, where no dose is known
_N_QUANTILES = 64  # of each of the two parameters


def dose_response(
    model: BaseModelClass,
    perturbations: Sequence[str] | None = None,
    credible_level: float = 0.95,
    ax: Axes | None = None,
) -> Axes:
    r"""Plot the Hill curves of perturbations, with intervals.

    The share of its full shift that a perturbation has at dose :math:`d` is
    :math:`d^h / (d^h + \mathrm{EC50}^h)`. Its interval at each dose follows from the posterior of
    EC50 and slope :math:`h`, which are independent and log-normal.

    Parameters
    ----------
    model
        A trained model made with ``dose_response="hill"``.
    perturbations
        Perturbations, eight at most; by default the four with the largest effects.
    credible_level
        Level of the intervals.
    ax
        Axes to draw into; a new figure by default.

    Returns
    -------
    The axes, with the dose on a logarithmic x axis. Curves are solid between the smallest and the
    largest dose that was measured and dashed beyond; a dot is at the EC50. Of a model without its
    AnnData, no dose is known, and curves are solid.

    Raises
    ------
    NotImplementedError
        If shifts are linear in the dose (``dose_response="hill"`` is not on).
    UnknownPerturbationError
        If the model has not seen a perturbation.
    ValueError
        If there are more perturbations than colours, none, or ``credible_level`` is not between 0
        and 1.

    Examples
    --------
    >>> model = SAMSVAE(adata, dose_response="hill")  # doctest: +SKIP
    >>> model.train()  # doctest: +SKIP
    >>> ax = scvi_sams.pl.dose_response(model, ["KLF1", "CEBPA"])  # doctest: +SKIP
    """
    table = model.get_dose_response(credible_level)
    if perturbations is None:
        strength = np.linalg.norm(model.get_perturbation_effect().loc[table.index], axis=1)
        perturbations = list(table.index[np.argsort(-strength, kind="stable")[:_SHOWN]])
    perturbations = [perturbations] if isinstance(perturbations, str) else list(perturbations)
    if unknown := [name for name in perturbations if name not in table.index]:
        raise unknown_perturbations(unknown, list(table.index))
    if not 1 <= len(perturbations) <= len(CATEGORICAL_COLORS):
        raise ValueError(
            f"{len(perturbations)} perturbations: give 1 to {len(CATEGORICAL_COLORS)}, and draw "
            "others into axes of their own."
        )
    table = table.loc[perturbations]
    measured = _measured_doses(model, perturbations)
    low, high = _dose_range(table, measured)
    doses = np.geomspace(low, high, 200)

    ax = axes_or_new(ax, (5.6, 3.6))
    band = min(BAND_ALPHA, 2 * BAND_ALPHA / len(table))  # many lie over each other
    for color, (name, row) in zip(CATEGORICAL_COLORS, table.iterrows(), strict=False):
        lower, upper = _response_interval(doses, row, credible_level)
        ax.fill_between(doses, lower, upper, color=color, alpha=band, linewidth=0)
        response = _response(doses, row["ec50"], row["slope"])
        known = np.ones(len(doses), bool)
        if name in measured.index:
            known = (doses >= measured.loc[name, "min"]) & (doses <= measured.loc[name, "max"])
        ax.plot(doses, response, color=color, linewidth=0.7 * LINE_WIDTH, linestyle=(0, (3, 2)))
        ax.plot(
            doses,
            np.where(known, response, np.nan),
            color=color,
            linewidth=1.3 * LINE_WIDTH,
            label=f"{name}: {row['ec50']:.2g} [{row['ec50_lower']:.2g}, {row['ec50_upper']:.2g}]",
        )
        if low <= row["ec50"] <= high:
            ax.plot(
                row["ec50"],
                0.5,
                "o",
                color=color,
                markersize=5,
                markeredgecolor="white",
                markeredgewidth=0.7,
                zorder=4,
            )
    ax.set(xscale="log", xlim=(low, high), ylim=(-0.02, 1.02))
    ax.set_xlabel("dose")
    ax.set_ylabel("share of the full shift")
    ax.legend(
        title=f"EC50 [{credible_level:.0%} interval]",
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
        fontsize="small",
        title_fontsize="small",
        alignment="left",
    )
    open_frame(ax)
    return ax


def _response(doses: NDArray[np.floating], ec50: float, slope: float) -> NDArray[np.float64]:
    return np.asarray(expit(slope * np.log(doses / ec50)))


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


def _measured_doses(model: BaseModelClass, perturbations: list[str]) -> pd.DataFrame:
    """Smallest and largest positive dose of each perturbation in the model's AnnData, if any."""
    bounds = pd.DataFrame(columns=["min", "max"], dtype=float)
    if model.adata is None:
        return bounds
    dosage = sparse.csc_matrix(registered_dosage(model.adata_manager))
    names = list(model.perturbation_names)
    for name in perturbations:
        given = dosage[:, names.index(name)].data
        given = given[given > 0]
        if given.size:
            bounds.loc[name] = [given.min(), given.max()]
    return bounds


def _dose_range(table: pd.DataFrame, measured: pd.DataFrame) -> tuple[float, float]:
    if measured.empty:
        return table["ec50"].min() / _DECADES, table["ec50"].max() * _DECADES
    return measured["min"].min() / _BEYOND, measured["max"].max() * _BEYOND
