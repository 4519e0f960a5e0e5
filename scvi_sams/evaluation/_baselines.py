"""Predictions without a neural network, from effects in training cells, that a model must beat."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

import anndata as ad
import numpy as np
import pandas as pd

from scvi_sams._exceptions import ScreenError
from scvi_sams.data.conditions import split_label
from scvi_sams.data.tables import profile_frame

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from scvi_sams.data.tables import ProfileTable


Baseline: TypeAlias = Callable[..., ad.AnnData]
"""Called with effects, conditions and the delimiter of their parts; see :data:`BASELINES`."""

_Parts: TypeAlias = "tuple[str, ...]"
_Rule: TypeAlias = "Callable[[_Parts], tuple[NDArray[np.float64], str]]"


class _Training:
    """Effects of the training conditions, found by the parts of a condition."""

    def __init__(self, effects: ProfileTable, delimiter: str | None) -> None:
        frame = profile_frame(effects, "effects")
        if frame.empty:
            raise ScreenError("`effects` has no condition to learn from.")
        if (faulty := ~np.isfinite(frame.to_numpy()).all(axis=1)).any():
            raise ScreenError(
                f"`effects` of {frame.index[faulty.argmax()]!r} are not finite: leave it out."
            )
        self.delimiter = delimiter
        self.genes = frame.columns.astype(str)
        self.values = frame.to_numpy()
        self.conditions = [self.parts(name) for name in frame.index]
        self.row_of = {parts: row for row, parts in enumerate(self.conditions)}
        if len(self.row_of) < len(frame):
            raise ScreenError(
                "Two conditions of `effects` differ in the order of their parts only: they are "
                "one condition, merge them."
            )
        self.mean = self.values.mean(axis=0)
        is_single = [len(parts) == 1 for parts in self.conditions]
        self.single_mean = self.values[is_single].mean(axis=0) if any(is_single) else self.mean

    def parts(self, condition: object) -> _Parts:
        return tuple(sorted(split_label(str(condition), self.delimiter)))

    def alone(self, parts: _Parts) -> tuple[NDArray[np.float64], str]:
        """Effect of each part measured alone (parts x genes); the mean for parts that were not."""
        rows = [self.row_of.get((part,)) for part in parts]
        effects = [self.single_mean if row is None else self.values[row] for row in rows]
        unseen = [part for part, row in zip(parts, rows, strict=True) if row is None]
        fallback = f"{', '.join(unseen)} not measured alone: mean effect of singles"
        return np.array(effects), fallback if unseen else ""


def _baseline(prepare: Callable[..., _Rule]) -> Baseline:
    """Predict by a rule: what is prepared once, from the training effects, for all conditions."""

    @wraps(prepare)
    def predict(
        effects: ProfileTable,
        conditions: Sequence[str],
        combination_delimiter: str | None = "+",
        **options: Any,
    ) -> ad.AnnData:
        training = _Training(effects, combination_delimiter)
        rule = prepare(training, **options)
        rows = [rule(training.parts(condition)) for condition in conditions]
        return ad.AnnData(
            np.array([effect for effect, _ in rows]).reshape(len(rows), len(training.genes)),
            obs=pd.DataFrame(
                {"fallback": [fallback for _, fallback in rows]},
                index=pd.Index([str(condition) for condition in conditions], dtype=object),
            ),
            var=pd.DataFrame(index=training.genes),
        )

    return predict


@_baseline
def _no_change(training: _Training) -> _Rule:
    return lambda parts: (np.zeros_like(training.mean), "")


@_baseline
def _perturbed_mean(training: _Training) -> _Rule:
    return lambda parts: (training.mean, "")


@_baseline
def _condition_mean(training: _Training) -> _Rule:
    def rule(parts: _Parts) -> tuple[NDArray[np.float64], str]:
        row = training.row_of.get(parts)
        if row is None:
            return training.mean, "not measured in training: mean of all conditions"
        return training.values[row], ""

    return rule


@_baseline
def _additive(training: _Training) -> _Rule:
    def rule(parts: _Parts) -> tuple[NDArray[np.float64], str]:
        effects, fallback = training.alone(parts)
        return effects.sum(axis=0), fallback

    return rule


@_baseline
def _matching_mean(training: _Training) -> _Rule:
    def rule(parts: _Parts) -> tuple[NDArray[np.float64], str]:
        effects, fallback = training.alone(parts)
        return effects.mean(axis=0), fallback

    return rule


@_baseline
def _nearest_combination(training: _Training) -> _Rule:
    candidates = [
        parts
        for parts in training.conditions
        if len(parts) > 1 and all((part,) in training.row_of for part in parts)
    ]
    sums = np.array([training.alone(parts)[0].sum(axis=0) for parts in candidates])
    sums = sums.reshape(len(candidates), len(training.genes))

    def rule(parts: _Parts) -> tuple[NDArray[np.float64], str]:
        effects, unseen = training.alone(parts)
        if unseen:
            return training.mean, f"{unseen.partition(':')[0]}: mean of all conditions"
        distance = np.linalg.norm(sums - effects.sum(axis=0), axis=1)
        distance[[other == parts for other in candidates]] = np.inf
        if not np.isfinite(distance).any():
            return (
                training.mean,
                "no other combination of measured parts: mean of all conditions",
            )
        return training.values[training.row_of[candidates[int(np.argmin(distance))]]], ""

    return rule


@_baseline
def _bilinear_ridge(
    training: _Training,
    n_components: int = 10,
    ridge_penalty: float = 0.1,
    perturbed_genes: Mapping[str, str] | None = None,
) -> _Rule:
    if n_components < 1:
        raise ValueError(f"n_components={n_components} must be at least 1.")
    if ridge_penalty <= 0:
        raise ValueError(f"ridge_penalty={ridge_penalty} must be above 0.")
    centred = (training.values - training.mean).T
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    used = np.flatnonzero(singular > 1e-10 * singular.max(initial=1e-300))[:n_components]
    genes = left[:, used] * singular[used]
    row_of = {gene: row for row, gene in enumerate(training.genes)}
    row_of |= {
        perturbation: row_of[gene]
        for perturbation, gene in (perturbed_genes or {}).items()
        if gene in row_of
    }

    def embedding(parts: _Parts) -> NDArray[np.float64]:
        return np.asarray(genes[[row_of[part] for part in parts]].sum(axis=0))

    embedded = [
        row for row, parts in enumerate(training.conditions) if all(p in row_of for p in parts)
    ]
    coefficients = None
    if embedded and used.size:
        conditions = np.array([embedding(training.conditions[row]) for row in embedded])
        penalty = ridge_penalty * np.eye(used.size)
        left_side = np.linalg.solve(genes.T @ genes + penalty, genes.T @ centred[:, embedded])
        coefficients = np.linalg.solve(
            conditions.T @ conditions + penalty, (left_side @ conditions).T
        ).T

    def rule(parts: _Parts) -> tuple[NDArray[np.float64], str]:
        if absent := [part for part in parts if part not in row_of]:
            return (
                training.mean,
                f"{', '.join(absent)} not among the genes: mean of all conditions",
            )
        if coefficients is None:
            return training.mean, "no training condition among the genes: mean of all conditions"
        return training.mean + genes @ (coefficients @ embedding(parts)), ""

    return rule


@_baseline
def _control_covariance(
    training: _Training,
    controls: ProfileTable | None = None,
    perturbed_genes: Mapping[str, str] | None = None,
) -> _Rule:
    if controls is None:
        return lambda parts: (training.mean, "no control cells: mean of all conditions")
    cells = profile_frame(controls, "controls")
    if (missing := training.genes.difference(cells.columns)).size:
        raise ScreenError(f"`controls` lacks the gene {missing[0]!r} of `effects`.")
    if len(cells) < 2:
        raise ScreenError("`controls` has fewer than two cells, which have no covariance.")
    expression = cells[training.genes].to_numpy()
    mean = expression.mean(axis=0)
    centred = expression - mean
    row_of = {gene: row for row, gene in enumerate(training.genes) if centred[:, row].any()}
    named = perturbed_genes or {}
    row_of |= {part: row_of[gene] for part, gene in named.items() if gene in row_of}

    def response(parts: _Parts) -> NDArray[np.float64]:
        rows = [row_of[part] for part in parts]
        slopes = centred.T @ centred[:, rows] / (centred[:, rows] ** 2).sum(axis=0)
        return np.asarray(slopes @ mean[rows])

    known = [parts for parts in training.conditions if all(part in row_of for part in parts)]
    if not known:
        return lambda parts: (
            training.mean,
            "no training condition among the genes: mean of all conditions",
        )
    shapes = np.array([response(parts) for parts in known])
    effects = training.values[[training.row_of[parts] for parts in known]]
    change = float((shapes * effects).sum() / max((shapes**2).sum(), 1e-300))

    def rule(parts: _Parts) -> tuple[NDArray[np.float64], str]:
        if absent := [part for part in parts if part not in row_of]:
            return (
                training.mean,
                f"{', '.join(absent)} not among the genes: mean of all conditions",
            )
        return change * response(parts), ""

    return rule


BASELINES: Mapping[str, Baseline] = MappingProxyType(
    {
        "no change": _no_change,
        "perturbed mean": _perturbed_mean,
        "training mean": _condition_mean,
        "additive": _additive,
        "matching mean": _matching_mean,
        "nearest combination": _nearest_combination,
        "bilinear ridge": _bilinear_ridge,
        "control covariance": _control_covariance,
    }
)
r"""Predictions that a model must beat, by the name that a scorecard gives them.

Each is a function ``(effects, conditions, combination_delimiter="+")``. ``effects`` are those of
the **training cells alone**, conditions x genes, as from :func:`observed_effects`; ``conditions``
are labels to predict, measured in training or not. It returns an AnnData, conditions x genes, with
effects in ``X``, in the units of the training table, and in ``obs["fallback"]`` what was done
where the rule does not apply, ``""`` for all other conditions. It raises
:class:`~scvi_sams.ScreenError` if there is no training condition, one is not finite, or two are
the same but for the order of their parts. A function of one's own with the same arguments can be
scored beside them.

With :math:`\Delta_{pg}` the training effects of the conditions :math:`P`:

``"no change"``
    :math:`\hat\Delta_{cg} = 0`, the controls' profile for every condition.
``"perturbed mean"``
    :math:`\hat\Delta_{cg} = \frac{1}{|P|} \sum_{p \in P} \Delta_{pg}`, what perturbations do on
    average, whichever it is (Ahlmann-Eltze, Huber and Anders, Nature Methods 2025; Vinas Torne et
    al., Nature Biotechnology 2025).
``"training mean"``
    :math:`\hat\Delta_{cg} = \Delta_{cg}`, what the same condition did in training cells, where it
    is hard to beat; otherwise the mean of all.
``"additive"``
    :math:`\hat\Delta_{A+B,\,g} = \Delta_{Ag} + \Delta_{Bg}`, for any number of parts; a part that
    was not measured alone contributes the mean effect of those that were (Ahlmann-Eltze et al.).
``"matching mean"``
    :math:`\hat\Delta_{A+B,\,g} = (\Delta_{Ag} + \Delta_{Bg}) / 2`, likewise (*Systema*, Vinas
    Torne et al.).
``"nearest combination"``
    The measured effect of the combination :math:`C + D`, other than the one to predict, with the
    smallest :math:`\lVert (\Delta_A + \Delta_B) - (\Delta_C + \Delta_D) \rVert_2`, of equally near
    ones the first. Where a part, or every candidate, was not measured alone: the mean of all.
``"bilinear ridge"``
    With :math:`Y` the training effects (genes x conditions), :math:`b` their mean, :math:`G` the
    scores of the genes on the first :math:`k` principal components of :math:`Y - b`, and
    :math:`p_c` the row of :math:`G` of the gene that the condition perturbs (the sum for several;
    :math:`P` has those of the training conditions),

    .. math::

        \hat\Delta_c = G K p_c + b, \qquad
        K = (G^\top G + \lambda I)^{-1} G^\top (Y - b) P (P^\top P + \lambda I)^{-1}.

    It predicts perturbations that were never measured, from how their own gene responds to others
    (Ahlmann-Eltze et al.; the sum for combinations is ours). Options: ``n_components=10``,
    ``ridge_penalty=0.1`` and ``perturbed_genes``, the gene that each perturbation acts on where it
    is not named like it. A condition with a part that is not among the genes takes no part in the
    regression and is predicted as :math:`b`.
``"control covariance"``
    With :math:`\Sigma` the covariance of genes over control cells, :math:`m` their mean and
    :math:`t` the gene that a perturbation acts on (the sum for several),

    .. math:: \hat\Delta_{cg} = \rho\, m_t\, \Sigma_{gt} / \Sigma_{tt},

    what else changes in control cells where the target is expressed less: the linear response of
    CIPHER. The share :math:`\rho` by which a target changes, the same for all, is the least
    squares one over training conditions, and is ours. Options: ``controls``, log-normalised
    expression of control cells (cells x genes), without which it is not applied, and
    ``perturbed_genes``. To score it: ``baselines={"control covariance":
    functools.partial(BASELINES["control covariance"], controls=cells)}``.

Examples
--------
>>> import pandas as pd
>>> from scvi_sams.evaluation import BASELINES
>>> effects = pd.DataFrame({"GATA1": [1.0, 3.0], "SPI1": [-2.0, 0.0]}, index=["A", "B"])
>>> BASELINES["additive"](effects, ["A+B"]).to_df().loc["A+B"].tolist()
[4.0, -2.0]
>>> BASELINES["training mean"](effects, ["C"]).obs.loc["C", "fallback"]
'not measured in training: mean of all conditions'
"""
