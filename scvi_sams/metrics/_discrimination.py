"""Whether a predicted effect is nearer to its own condition than to the others."""

from __future__ import annotations

__all__ = ["perturbation_discrimination"]

from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from scipy.spatial.distance import cdist

from scvi_sams._exceptions import ScreenError
from scvi_sams.data._labels import split_label
from scvi_sams.metrics._profiles import aligned_profiles, profile_frame

if TYPE_CHECKING:
    from scvi_sams.metrics._profiles import ProfileTable

_DISTANCES = {"l1": "cityblock", "l2": "euclidean", "cosine": "cosine"}


def perturbation_discrimination(
    predicted: ProfileTable,
    observed: ProfileTable,
    metric: Literal["l1", "l2", "cosine"] = "l1",
    exclude_target_genes: bool = True,
    combination_delimiter: str | None = "+",
) -> pd.Series:
    r"""Perturbation discrimination score (PDS) of each predicted condition.

    With :math:`N` observed conditions and :math:`d` the distance between effects,

    .. math::

        \mathrm{PDS}_p = 1 - \frac{1}{N} \sum_{q \ne p} \left(
            \mathbf 1[d(\hat\Delta_p, \Delta_q) < d(\hat\Delta_p, \Delta_p)]
            + \tfrac12\, \mathbf 1[d(\hat\Delta_p, \Delta_q) = d(\hat\Delta_p, \Delta_p)] \right).

    It is 1 where a prediction is nearest to what it predicts. One and the same prediction for all
    conditions has a mean of :math:`(N + 1) / 2N`, as has one that is unrelated, on average.

    Parameters
    ----------
    predicted
        Conditions x genes, predicted effects.
    observed
        Conditions x genes, observed effects: every condition of ``predicted``, and those it may
        be confused with. Scores of different sets of conditions do not compare.
    metric
        Distance: ``"l1"``, ``"l2"`` (both change with the scale of the predictions) or
        ``"cosine"`` (does not).
    exclude_target_genes
        Leave out the genes a condition is named after: a target that was knocked out tells on
        itself.
    combination_delimiter
        What joins the parts of a condition; None takes every name as one part.

    Returns
    -------
    Score of each condition of ``predicted``, named ``"perturbation_discrimination"``; NaN where a
    prediction is not finite, or a distance not defined (``"cosine"`` of no effect at all).

    Raises
    ------
    ScreenError
        If a condition or gene of ``predicted`` is not in ``observed``, or a value of ``observed``
        is not finite.
    ValueError
        If ``metric`` is unknown.

    Notes
    -----
    The score of the Virtual Cell Challenge (Roohani et al., Cell 2025) as
    `cell-eval <https://github.com/ArcInstitute/cell-eval>`_ computes it
    (``discrimination_score_l1``), with two differences: ties share their rank, so that the order
    of conditions earns nothing, and the targets of combinations are left out as well.

    Examples
    --------
    >>> import pandas as pd
    >>> from scvi_sams.metrics import perturbation_discrimination
    >>> effects = pd.DataFrame({"GATA1": [1.0, 3.0], "SPI1": [0.0, -1.0]}, index=["A", "B"])
    >>> perturbation_discrimination(0.8 * effects, effects).to_dict()
    {'A': 1.0, 'B': 1.0}
    >>> perturbation_discrimination(effects[::-1].set_index(effects.index), effects).to_dict()
    {'A': 0.5, 'B': 0.5}
    """
    if metric not in _DISTANCES:
        raise ValueError(f"metric={metric!r} is unknown; use one of {', '.join(_DISTANCES)}.")
    values, _ = aligned_profiles(predicted, observed)
    truth = profile_frame(observed, "observed")[values.columns]
    if not (finite := np.isfinite(truth).all(axis=1)).all():
        raise ScreenError(
            f"`observed` effects of {truth.index[finite.argmin()]!r} are not finite: leave it out."
        )
    genes, matrix = truth.columns, truth.to_numpy()
    scores = np.full(len(values), np.nan)
    own_rows = truth.index.get_indexer(values.index)
    for row, (condition, own) in enumerate(zip(values.index, own_rows, strict=True)):
        prediction = values.iloc[[row]].to_numpy()
        candidates = matrix
        if exclude_target_genes:
            targets = genes.isin(split_label(str(condition), combination_delimiter))
            if targets.any():
                prediction, candidates = prediction[:, ~targets], matrix[:, ~targets]
        distance = cdist(prediction, candidates, _DISTANCES[metric])[0]
        if np.isnan(distance[own]):
            continue
        closer = (distance < distance[own]).sum() + ((distance == distance[own]).sum() - 1) / 2
        scores[row] = 1 - closer / len(truth)
    return pd.Series(scores, index=values.index.copy(), name="perturbation_discrimination")
