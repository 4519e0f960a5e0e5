"""Differential expression from draws of a log fold change."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scvi_sams.tl._gene_programs import summarize_effects
from scvi_sams.tl._mechanisms import bayesian_q_value

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["differential_expression_table"]


_EPSILON = 1e-8  # of the Bayes factor, as in scvi-tools


def differential_expression_table(
    lfc: NDArray[np.floating],
    genes: Sequence[str] | NDArray[np.str_],
    delta: float = 0.25,
    fdr: float = 0.05,
    credible_level: float = 0.95,
) -> pd.DataFrame:
    r"""Summarise posterior draws of log fold changes, gene by gene.

    A gene counts as differentially expressed in a draw if :math:`|\mathrm{lfc}| \ge \delta`. Genes
    are called in the order of the probability of that, as long as the expected share of false
    calls, the mean of one minus that probability, is at most `fdr`.

    Parameters
    ----------
    lfc
        Draws of the log2 fold change, shape ``(n_draws, n_genes)``.
    genes
        Names of the genes.
    delta
        Change that is worth calling.
    fdr
        Expected false discovery rate of the calls.
    credible_level
        Level of the interval.

    Returns
    -------
    A row a gene, in the order of `genes`, with scvi-tools' columns ``proba_de``,
    ``proba_not_de``, ``bayes_factor`` (natural logarithm of their ratio), ``lfc_mean``,
    ``lfc_median``, ``lfc_std``, ``lfc_min``, ``lfc_max`` and ``is_de_fdr_<fdr>``, and besides
    ``lfc_lower`` and ``lfc_upper`` (interval), ``lfsr`` (local false sign rate: probability that
    the change is zero or of the other sign) and ``q_value`` (expected share of false calls, were
    the gene the last one called).

    Raises
    ------
    ValueError
        If shapes do not match, there is no draw or an argument is out of its range.

    Notes
    -----
    Boyeau et al., PNAS 120, e2209124120 (2023), which is scvi-tools' mode ``"change"``; the local
    false sign rate is that of Stephens, Biostatistics 18, 275 (2017).

    Examples
    --------
    >>> import numpy as np
    >>> from scvi_sams.tl import differential_expression_table
    >>> table = differential_expression_table(np.array([[1.0, 0.1], [2.0, -0.1]]), ["MYC", "ACTB"])
    >>> table[["lfc_mean", "proba_de", "is_de_fdr_0.05"]]
          lfc_mean  proba_de  is_de_fdr_0.05
    MYC        1.5       1.0            True
    ACTB       0.0       0.0           False
    """
    draws = np.asarray(lfc, dtype=np.float64)
    if draws.ndim != 2 or len(draws) == 0 or draws.shape[1] != len(genes):
        raise ValueError(
            f"lfc of shape {draws.shape} must be draws x genes, with one draw or more of "
            f"{len(genes)} genes."
        )
    if not 0 <= delta < np.inf:
        raise ValueError(f"delta={delta!r} must be 0 or more.")
    if not 0 < fdr < 1:
        raise ValueError(f"fdr={fdr!r} must be between 0 and 1.")
    summary = summarize_effects(draws, credible_level)
    proba_de = (np.abs(draws) >= delta).mean(axis=0)
    other_sign = np.minimum((draws <= 0).mean(axis=0), (draws >= 0).mean(axis=0))
    q_value = bayesian_q_value(pd.DataFrame({"proba_de": proba_de}))["proba_de"].to_numpy()
    return pd.DataFrame(
        {
            "proba_de": proba_de,
            "proba_not_de": 1 - proba_de,
            "bayes_factor": np.log(proba_de + _EPSILON) - np.log(1 - proba_de + _EPSILON),
            "lfc_mean": summary.mean,
            "lfc_median": np.median(draws, axis=0),
            "lfc_std": summary.std,
            "lfc_min": draws.min(axis=0),
            "lfc_max": draws.max(axis=0),
            "lfc_lower": summary.lower,
            "lfc_upper": summary.upper,
            "lfsr": other_sign,
            "q_value": q_value,
            f"is_de_fdr_{fdr}": q_value <= fdr,
        },
        index=pd.Index(genes),
    )
