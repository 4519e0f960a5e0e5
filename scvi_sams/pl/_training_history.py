"""How the bound came down during training."""

from __future__ import annotations

__all__ = ["training_history"]

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import MaxNLocator

from scvi_sams.pl._figure import CATEGORICAL_COLORS, LINE_WIDTH, axes_or_new, open_frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from scvi.model.base import BaseModelClass


def training_history(model: BaseModelClass, ax: Axes | None = None) -> Axes:
    """Plot the negative evidence lower bound of every epoch.

    The first tenth of the epochs, where the bound falls by orders of magnitude more than
    afterwards, does not set the scale.

    Parameters
    ----------
    model
        A trained model. The bound on validation cells is drawn where it was computed.
    ax
        Axes to draw into; a new figure by default.

    Returns
    -------
    The axes, with the epoch on x and nats a cell on y.

    Raises
    ------
    ValueError
        If the model has no training history.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=500, n_genes=100)
    >>> scvi_sams.SAMSVAE.setup_anndata(
    ...     adata, perturbation_key="perturbation", control="control"
    ... )
    >>> model = scvi_sams.SAMSVAE(adata, n_latent=8)
    >>> model.train(max_epochs=2, enable_progress_bar=False)
    >>> ax = scvi_sams.pl.training_history(model)
    """
    history = model.history or {}
    curves = {
        label: history[key].iloc[:, 0].dropna().astype(float)
        for key, label in (("elbo_train", "training"), ("elbo_validation", "validation"))
        if key in history and history[key].iloc[:, 0].notna().any()
    }
    if not curves:
        raise ValueError("The model has no training history: call `train` first.")

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
    open_frame(ax)
    if len(curves) > 1:
        ax.legend(frameon=False)
    return ax
