"""Whether perturbations of one pathway are alike in what was learned about them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, permutation_test_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from scvi_sams._exceptions import ScreenError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["PathwayAccuracy", "pathway_accuracy"]


class PathwayAccuracy(NamedTuple):
    """Accuracy of pathways told from a table, against chance; see :func:`pathway_accuracy`."""

    accuracy: float
    """Share of perturbations whose pathway is told right, mean over folds."""
    null_mean: float
    """Mean accuracy with permuted pathways."""
    null_std: float
    """Standard deviation of the accuracy with permuted pathways."""
    null_95: float
    """95th percentile of the accuracy with permuted pathways."""
    p_value: float
    """Share of permutations that are as accurate, the true labels counted as one of them."""
    majority_share: float
    """Share of the most common pathway: the accuracy of always naming it."""
    n_perturbations: int
    """Perturbations that were classified."""
    n_pathways: int
    """Pathways among them."""
    dropped: tuple[str, ...]
    """Pathways left out, with fewer perturbations than folds."""


def pathway_accuracy(
    table: pd.DataFrame,
    pathways: Mapping[str, str] | pd.Series,
    n_splits: int = 5,
    n_permutations: int = 100,
    seed: int = 0,
) -> PathwayAccuracy:
    r"""Cross-validated accuracy of the annotated pathway of a perturbation.

    A multinomial logistic regression (ridge penalty, ``C=1``, columns standardised within each
    fold) is fitted on the rows of all but one fold and names the pathways of the rest, with
    accuracy :math:`a`. The same is done :math:`n` times with permuted pathways:

    .. math:: p = \frac{1 + \sum_{i=1}^n \mathbf 1[a_i \ge a]}{n + 1}

    Parameters
    ----------
    table
        Perturbations x latents: masks (``model.get_perturbation_mask()``) or effects.
    pathways
        Pathway of each perturbation, by its name. Perturbations without one are not used, nor are
        those in one that has fewer than ``n_splits``.
    n_splits
        Folds, each with its share of every pathway.
    n_permutations
        Permutations :math:`n` of the null.
    seed
        Seed of folds and permutations.

    Returns
    -------
    Accuracy, a summary of the null and the p-value.

    Raises
    ------
    ScreenError
        If fewer than two pathways are left, the table names a perturbation twice, or it holds
        values that are not finite.
    ValueError
        If ``n_splits`` is less than 2 or ``n_permutations`` less than 1.

    Notes
    -----
    Permutation test of Ojala and Garriga, JMLR 11, 1833 (2010), by
    :func:`sklearn.model_selection.permutation_test_score`. Annotations are named beforehand, so
    that nothing is picked by hand.

    Examples
    --------
    >>> import numpy as np
    >>> import pandas as pd
    >>> from scvi_sams.evaluation import pathway_accuracy
    >>> names = [f"P{i}" for i in range(20)]
    >>> mask = pd.DataFrame(np.repeat(np.eye(2), 10, axis=0), index=names)
    >>> pathways = dict.fromkeys(names[:10], "MAPK") | dict.fromkeys(names[10:], "WNT")
    >>> result = pathway_accuracy(mask, pathways, n_permutations=19)
    >>> result.accuracy, result.p_value
    (1.0, 0.05)
    """
    if n_splits < 2:
        raise ValueError(f"n_splits={n_splits}: cross-validation needs at least 2 folds.")
    if n_permutations < 1:
        raise ValueError(f"n_permutations={n_permutations}: at least one is needed.")
    if table.index.has_duplicates:
        twice = table.index[table.index.duplicated()][0]
        raise ScreenError(f"The table names the perturbation {twice!r} twice: keep one row.")
    annotation = pd.Series(dict(pathways), dtype=object).reindex(table.index).dropna()
    sizes = annotation.value_counts()
    dropped = sizes.index[sizes < n_splits]
    annotation = annotation[~annotation.isin(dropped)]
    if annotation.nunique() < 2:
        raise ScreenError(
            f"{annotation.nunique()} pathways have at least n_splits={n_splits} perturbations in "
            f"the table: annotate more, or lower n_splits."
        )
    values = table.loc[annotation.index].to_numpy(dtype=np.float64)
    if not (finite := np.isfinite(values).all(axis=1)).all():
        raise ScreenError(
            f"The table holds values of {annotation.index[finite.argmin()]!r} that are not "
            f"finite: leave it out."
        )
    accuracy, null, p_value = permutation_test_score(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=1_000)),
        values,
        annotation.to_numpy(dtype=str),
        cv=StratifiedKFold(n_splits, shuffle=True, random_state=seed),
        n_permutations=n_permutations,
        random_state=seed,
        scoring="accuracy",
    )
    return PathwayAccuracy(
        accuracy=float(accuracy),
        null_mean=float(null.mean()),
        null_std=float(null.std(ddof=1)) if len(null) > 1 else float("nan"),
        null_95=float(np.quantile(null, 0.95)),
        p_value=float(p_value),
        majority_share=float(annotation.value_counts(normalize=True).iloc[0]),
        n_perturbations=len(annotation),
        n_pathways=int(annotation.nunique()),
        dropped=tuple(sorted(map(str, dropped))),
    )
