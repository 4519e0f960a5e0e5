"""What moves with a latent: summaries of its effects on genes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from scvi_sams.data.tables import profile_frame

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from scvi_sams.data.tables import ProfileTable

__all__ = ["EffectSummary", "summarize_effects", "top_genes", "total_variance_share"]


class EffectSummary(NamedTuple):
    """Summary of draws of the effect on each gene, each of shape ``(n_genes,)``."""

    mean: NDArray[np.float64]
    """Mean."""
    std: NDArray[np.float64]
    """Standard deviation."""
    lower: NDArray[np.float64]
    """Lower end of the central interval."""
    upper: NDArray[np.float64]
    """Upper end of the central interval."""
    sign_rate: NDArray[np.float64]
    """Share of the draws with the sign of the mean; 0 where the mean is 0."""


def summarize_effects(effects: NDArray[np.floating], credible_level: float) -> EffectSummary:
    """Mean, spread, interval and sign rate of draws of effects.

    Parameters
    ----------
    effects
        Draws, shape ``(n_draws, n_genes)``.
    credible_level
        Level of the interval.

    Returns
    -------
    Summary by gene.

    Raises
    ------
    ValueError
        If `credible_level` is not between 0 and 1.

    Examples
    --------
    >>> import numpy as np
    >>> from scvi_sams.tl import summarize_effects
    >>> summary = summarize_effects(np.array([[-1.0], [1.0], [2.0], [2.0]]), 0.5)
    >>> summary.mean.item(), summary.sign_rate.item()
    (1.0, 0.75)
    """
    if not 0 < credible_level < 1:
        raise ValueError(f"credible_level={credible_level!r} must be between 0 and 1.")
    draws = np.asarray(effects, dtype=np.float64)
    mean = draws.mean(axis=0)
    tail = 50 * (1 - credible_level)
    lower, upper = np.percentile(draws, [tail, 100 - tail], axis=0)
    sign_rate = ((np.sign(draws) == np.sign(mean)) & (mean != 0)).mean(axis=0)
    return EffectSummary(mean, draws.std(axis=0), lower, upper, sign_rate)


def total_variance_share(
    values: NDArray[np.floating], values_redrawn: NDArray[np.floating]
) -> float:
    r"""Share of a variance that would go if one of its inputs were held fixed.

    The total-effect index of Sobol by Jansen's estimator, summed over genes,

    .. math::
        \frac{\sum_g \tfrac12\, \mathrm E\,(y_g(z) - y_g(z'))^2}{\sum_g \mathrm{Var}\, y_g(z)},

    where :math:`z'` is :math:`z` with the input drawn anew. Over all inputs it adds up to 1 for a
    linear function and to more where inputs act together.

    Parameters
    ----------
    values
        Values, shape ``(n_draws, n_genes)``.
    values_redrawn
        Values with one input drawn anew, likewise.

    Returns
    -------
    The share; 0 if nothing varies.

    Notes
    -----
    Jansen, Computer Physics Communications 117, 35 (1999); Saltelli et al. (2010).

    Examples
    --------
    >>> import numpy as np
    >>> from scvi_sams.tl import total_variance_share
    >>> first, second, anew = np.random.default_rng(0).normal(size=(3, 100_000, 1))
    >>> round(total_variance_share(2 * first + second, 2 * anew + second), 2)
    0.8
    """
    total = float(np.var(values, axis=0, dtype=np.float64).sum())
    if total == 0:
        return 0.0
    change = np.asarray(values, dtype=np.float64) - values_redrawn
    return float(0.5 * np.square(change).mean(axis=0).sum() / total)


def top_genes(
    programs: ProfileTable, n_genes: int = 20, min_sign_rate: float = 0.0
) -> pd.DataFrame:
    """The genes that programmes raise and lower most.

    Parameters
    ----------
    programs
        Programmes x genes, signed: from ``model.get_gene_programs()``, or any effects.
    n_genes
        Genes of each programme and direction, at most.
    min_sign_rate
        Sign rate that a gene must have (``layers["sign_rate"]``).

    Returns
    -------
    A row a gene: ``program``, ``direction`` (``"up"`` or ``"down"``), ``rank`` (from 1),
    ``gene``, ``effect``, and ``sign_rate`` where there is one.

    Raises
    ------
    ScreenError
        If a sign rate is asked for and `programs` has none.
    ValueError
        If a number is out of its range.

    Examples
    --------
    >>> import pandas as pd
    >>> from scvi_sams.tl import top_genes
    >>> effect = pd.DataFrame({"STAT1": [2.0], "ACTB": [0.0], "MYC": [-1.0]}, index=["latent_0"])
    >>> top_genes(effect)[["direction", "rank", "gene"]]
      direction  rank   gene
    0        up     1  STAT1
    1      down     1    MYC
    """
    if n_genes < 1:
        raise ValueError(f"n_genes={n_genes}: at least one is needed.")
    if not 0 <= min_sign_rate <= 1:
        raise ValueError(f"min_sign_rate={min_sign_rate!r} must be between 0 and 1.")
    frame = profile_frame(programs, "programs")
    effects = frame.to_numpy()
    has_rate = not isinstance(programs, pd.DataFrame) and "sign_rate" in programs.layers
    rate = None
    if has_rate or min_sign_rate > 0:
        rate = profile_frame(programs, "programs", layer="sign_rate").to_numpy()
    eligible = np.ones(effects.shape, bool) if rate is None else rate >= min_sign_rate
    rows: list[pd.DataFrame] = []
    for row, name in enumerate(frame.index):
        for direction, sign in (("up", 1), ("down", -1)):
            signed = sign * effects[row]
            order = np.argsort(-signed, kind="stable")
            chosen = order[(signed[order] > 0) & eligible[row, order]][:n_genes]
            table = pd.DataFrame(
                {
                    "program": name,
                    "direction": direction,
                    "rank": np.arange(1, len(chosen) + 1),
                    "gene": frame.columns.to_numpy(object)[chosen],
                    "effect": effects[row, chosen],
                }
            )
            if rate is not None:
                table["sign_rate"] = rate[row, chosen]
            rows.append(table)
    return pd.concat(rows, ignore_index=True)
