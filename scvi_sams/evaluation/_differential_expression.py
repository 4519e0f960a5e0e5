"""Differential expression that was observed, and whether predicted effects agree with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.stats import false_discovery_control, mannwhitneyu
from sklearn.metrics import roc_auc_score

from scvi_sams.data.tables import (
    aligned_profiles,
    dense,
    log_expression_chunks,
    profile_frame,
    ratio,
)
from scvi_sams.evaluation._observed import (
    _condition_groups,
    _obs_column,
    observed_average_treatment_effect,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from scvi_sams.data.tables import ProfileTable

__all__ = ["differential_expression_agreement", "observed_differential_expression"]


_GENES_PER_BLOCK = 500  # bounds the dense copy of the cells of a condition and the controls
_DECIMALS = 10  # 1 count of 50 and 2 of 100 are a tie, whatever rounding made of them


def observed_differential_expression(
    adata: ad.AnnData,
    perturbation_key: str,
    control: str | Sequence[str],
    layer: str | None = None,
    size_factor_key: str | None = None,
    conditions: Sequence[str] | None = None,
    scale: float = 1e4,
    min_cells: int = 2,
) -> ad.AnnData:
    """Test each gene of each condition against the controls.

    Two-sided Mann-Whitney test (Normal approximation, corrected for ties and continuity) of
    ``log2(1 + scale * x / l)`` between the cells of the condition and the controls; false
    discovery rates by Benjamini and Hochberg over the genes of a condition.

    Parameters
    ----------
    adata, perturbation_key, control, layer, size_factor_key, conditions, scale, min_cells
        As for :func:`observed_average_treatment_effect`.

    Returns
    -------
    What :func:`observed_average_treatment_effect` returns, with ``layers["p_value"]`` and
    ``layers["fdr"]`` (the p-value adjusted; below 0.05 it is differential at that rate).

    Raises
    ------
    ScreenError
        As :func:`observed_average_treatment_effect`.

    Notes
    -----
    :func:`scipy.stats.mannwhitneyu` and :func:`scipy.stats.false_discovery_control`. A gene that
    is the same in all cells has a p-value of 1. Time goes with conditions x controls x genes: for
    thousands of conditions, `pdex <https://github.com/ArcInstitute/pdex>`_ (extra ``eval``) is
    faster.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=1_000, n_genes=100)
    >>> observed = scvi_sams.evaluation.observed_differential_expression(
    ...     adata, perturbation_key="perturbation", control="control", conditions=["P001"]
    ... )
    >>> sorted(observed.layers)
    ['fdr', 'p_value', 'standard_error']
    """
    observed = observed_average_treatment_effect(
        adata, perturbation_key, control, layer, size_factor_key, conditions, scale, min_cells
    )
    groups = _condition_groups(adata, perturbation_key, control, conditions, min_cells)
    library = None if size_factor_key is None else _obs_column(adata, size_factor_key)
    chunks = [chunk for _, chunk in log_expression_chunks(adata, layer, library, scale)]
    expression = sp.vstack(chunks, "csr") if sp.issparse(chunks[0]) else np.vstack(chunks)
    p_values = np.ones(observed.shape)
    for start in range(0, adata.n_vars, _GENES_PER_BLOCK):
        genes = slice(start, start + _GENES_PER_BLOCK)
        block = expression[:, genes]
        control_block = dense(block[groups.row == 0]).round(_DECIMALS)
        for row in range(observed.n_obs):
            cells = dense(block[groups.row == row + 1]).round(_DECIMALS)
            p_values[row, genes] = _mann_whitney(cells, control_block)
    observed.layers["p_value"] = p_values
    observed.layers["fdr"] = false_discovery_control(p_values, axis=1)
    return observed


def differential_expression_agreement(
    predicted: ProfileTable, observed: ad.AnnData, fdr: float = 0.05
) -> pd.DataFrame:
    r"""Whether predicted effects agree with the genes that were seen to change.

    With :math:`D_c` the genes that are differential at the rate ``fdr``, :math:`I_{cg}` the
    predicted intervals and :math:`\hat\Delta_{cg}` the predicted effects,

    .. math::

        \mathrm{detected}_c &= \frac{1}{|D_c|} \sum_{g \in D_c} \mathbf 1[0 \notin I_{cg}]
        \\
        \mathrm{sign\ agreement}_c &= \frac{1}{|D_c|} \sum_{g \in D_c}
            \mathbf 1[\mathrm{sign}\,\hat\Delta_{cg} = \mathrm{sign}\,\Delta_{cg}]

    and the area under the ROC curve of :math:`|\hat\Delta_{cg}|` for :math:`g \in D_c`.

    Parameters
    ----------
    predicted
        Conditions x genes, predicted effects; with intervals in ``layers["lower"]`` and
        ``layers["upper"]``, as from ``model.get_average_treatment_effect``, if it is to be asked
        whether they hold 0.
    observed
        From :func:`observed_differential_expression`, with every condition and gene of
        ``predicted``.
    fdr
        False discovery rate of the observed changes.

    Returns
    -------
    Table indexed by the conditions of ``predicted``: ``n_differential``; ``detected`` and
    ``detected_elsewhere``, shares of the differential and of the other genes whose interval does
    not hold 0 (NaN without intervals); ``sign_agreement``; ``auroc``. NaN where there is no such
    gene.

    Raises
    ------
    ScreenError
        If tables do not match, or ``observed`` has no layer ``"fdr"``.
    ValueError
        If ``fdr`` is not between 0 and 1.

    Notes
    -----
    A posterior predictive check of effects: genes that change should have effects that the model
    is sure of. A gene without a significant change may still have an effect, too small for the
    cells there are: ``detected_elsewhere`` is no error rate.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=1_000, n_genes=100)
    >>> observed = scvi_sams.evaluation.observed_differential_expression(
    ...     adata, perturbation_key="perturbation", control="control", conditions=["P001"]
    ... )
    >>> table = scvi_sams.evaluation.differential_expression_agreement(observed, observed)
    >>> float(table.loc["P001", "sign_agreement"])
    1.0
    """
    if not 0 < fdr < 1:
        raise ValueError(f"fdr={fdr!r} must be between 0 and 1.")
    guess_frame, truth_frame = aligned_profiles(predicted, observed)
    adjusted = profile_frame(observed, "observed", layer="fdr")
    differential = (adjusted.loc[truth_frame.index, truth_frame.columns] < fdr).to_numpy()
    guess, truth = guess_frame.to_numpy(), truth_frame.to_numpy()
    excludes_zero = np.full(guess.shape, np.nan)
    if isinstance(predicted, ad.AnnData) and {"lower", "upper"} <= set(predicted.layers):
        lower, upper = (dense(predicted.layers[end]) for end in ("lower", "upper"))
        excludes_zero = np.where(np.isnan(lower + upper), np.nan, (lower > 0) | (upper < 0))
    same_sign = np.where(np.isfinite(guess), np.sign(guess) == np.sign(truth), np.nan)
    return pd.DataFrame(
        {
            "n_differential": differential.sum(axis=1),
            "detected": _share_among(excludes_zero, differential),
            "detected_elsewhere": _share_among(excludes_zero, ~differential),
            "sign_agreement": _share_among(same_sign, differential),
            "auroc": [_auroc(*row) for row in zip(differential, np.abs(guess), strict=True)],
        },
        index=guess_frame.index.copy(),
    )


def _mann_whitney(
    cells: NDArray[np.float64], controls: NDArray[np.float64]
) -> NDArray[np.float64]:
    """P-value of each gene; 1 where all values are the same."""
    varies = (np.ptp(cells, axis=0) > 0) | (np.ptp(controls, axis=0) > 0)
    varies |= cells[0] != controls[0]
    p_values = np.ones(cells.shape[1])
    if varies.any():
        p_values[varies] = mannwhitneyu(
            cells[:, varies], controls[:, varies], axis=0, method="asymptotic"
        ).pvalue
    return p_values


def _share_among(values: NDArray[np.float64], where: NDArray[np.bool_]) -> NDArray[np.float64]:
    return ratio(np.where(where, values, 0).sum(axis=1), where.sum(axis=1).astype(float))


def _auroc(is_differential: NDArray[np.bool_], strength: NDArray[np.float64]) -> float:
    if is_differential.all() or not is_differential.any() or not np.isfinite(strength).all():
        return float("nan")
    return float(roc_auc_score(is_differential, strength))
