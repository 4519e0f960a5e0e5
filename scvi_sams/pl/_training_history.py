"""How the bound came down during training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import MaxNLocator

from scvi_sams.pl._figure import CATEGORICAL_COLORS, LINE_WIDTH, axes_or_new

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd
    from matplotlib.axes import Axes


def training_history(history: Mapping[str, pd.DataFrame], ax: Axes | None = None) -> Axes:
    """Plot the negative evidence lower bound of every epoch.

    The first tenth of the epochs, where the bound falls by orders of magnitude more than
    afterwards, does not set the scale.

    Parameters
    ----------
    history
        ``model.history`` after training. The bound on validation cells is drawn where it was
        computed.
    ax
        Axes to draw into; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
        The axes, with the epoch on x and nats a cell on y.

    Raises
    ------
    ValueError
        If there is no bound in the history.

    Examples
    --------
    >>> import pandas as pd, scvi_sams
    >>> history = {"elbo_train": pd.DataFrame({"elbo_train": [900.0, 450.0, 420.0]})}
    >>> ax = scvi_sams.pl.training_history(history)
    """
    curves = {
        label: history[key].iloc[:, 0].dropna().astype(float)
        for key, label in (("elbo_train", "training"), ("elbo_validation", "validation"))
        if key in (history or {}) and history[key].iloc[:, 0].notna().any()
    }
    if not curves:
        raise ValueError("There is no bound in the history: give `model.history` after `train`.")

    ax = axes_or_new(ax, (5.0, 3.5))
    settled = []
    for color, (label, curve) in zip(CATEGORICAL_COLORS, curves.items(), strict=False):
        ax.plot(curve.index, curve, color=color, label=f"{label} cells", linewidth=LINE_WIDTH)
        ax.annotate(
            f"{curve.iloc[-1]:,.1f}",
            (curve.index[-1], curve.iloc[-1]),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=color,
            fontsize="small",
            annotation_clip=False,
        )
        settled.append(curve[curve.index >= curve.index[-1] * 0.1])
    values = np.concatenate(settled)
    values = values[np.isfinite(values)]
    if values.size and np.ptp(values) > 0:
        margin = 0.05 * np.ptp(values)
        ax.set_ylim(values.min() - margin, values.max() + margin)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("epoch")
    ax.set_ylabel("negative ELBO (nats a cell)")
    if len(curves) > 1:
        ax.legend(frameon=False)
    return ax
