"""Predictions without a neural network, fitted on training cells, that a model must beat."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd

from scvi_sams._exceptions import ScreenError
from scvi_sams.data.conditions import split_label
from scvi_sams.data.tables import profile_frame
from scvi_sams.evaluation._agreement import perturbed_reference

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Self

    from numpy.typing import NDArray

    from scvi_sams.data.tables import ProfileTable

__all__ = [
    "AdditiveEffects",
    "Baseline",
    "BilinearRidge",
    "ConditionMean",
    "MatchingMean",
    "NearestMeasuredCombination",
    "NoChange",
    "PerturbedMean",
]


class Prediction(NamedTuple):
    """Effect of one condition on each gene, and what was done where the rule does not apply."""

    effect: NDArray[np.float64]
    fallback: str = ""


@dataclass
class Baseline(ABC):
    """Rule that predicts effects of conditions from effects measured in training cells.

    Baselines differ in one step only: what they make of the effects of training conditions. All
    take the same table, and give one laid out as that of a model.

    Parameters
    ----------
    combination_delimiter
        What joins the parts of a condition; None takes every name as one part.
    """

    combination_delimiter: str | None = "+"

    name: ClassVar[str]
    """What a scorecard calls it."""

    def fit(self, effects: ProfileTable) -> Self:
        """Take in the effects of the training cells.

        Parameters
        ----------
        effects
            Conditions x genes, effects against the controls in **training cells alone**, from
            :func:`observed_average_treatment_effect` or :func:`batch_matched_treatment_effect`.
            ``var["control_mean"]`` is used if it is there.

        Returns
        -------
        The baseline itself.

        Raises
        ------
        ScreenError
            If there is no condition, a value is not finite, or two conditions are the same but
            for the order of their parts.
        """
        frame = profile_frame(effects, "effects")
        if frame.empty:
            raise ScreenError("`effects` has no condition to learn from.")
        if (faulty := ~np.isfinite(frame.to_numpy()).all(axis=1)).any():
            raise ScreenError(
                f"`effects` of {frame.index[faulty.argmax()]!r} are not finite: leave it out."
            )
        self.parts_of_ = {str(name): self._parts(str(name)) for name in frame.index}
        self.row_of_ = {parts: row for row, parts in enumerate(self.parts_of_.values())}
        if len(self.row_of_) < len(frame):
            raise ScreenError(
                "Two conditions of `effects` differ in the order of their parts only: they are "
                "one condition, merge them."
            )
        self.effects_ = frame
        self.control_mean_: pd.Series | None = None
        if isinstance(effects, ad.AnnData) and "control_mean" in effects.var:
            self.control_mean_ = effects.var["control_mean"].astype(np.float64)
        self._fit()
        return self

    def predict(self, conditions: Sequence[str]) -> ad.AnnData:
        """Predict conditions, measured in training or not.

        Parameters
        ----------
        conditions
            Labels, such as ``"A"`` or ``"A+B"``.

        Returns
        -------
        AnnData (conditions x genes) with effects in ``X``, in the units of the training table;
        where it had ``var["control_mean"]``, mean expression (controls plus effect) in
        ``layers["expression"]``; and in ``obs["fallback"]`` what was done for conditions to which
        the rule does not apply, ``""`` for all others.

        Raises
        ------
        RuntimeError
            If the baseline was not fitted.
        """
        if not hasattr(self, "effects_"):
            raise RuntimeError(f"{type(self).__name__} was not fitted: call fit(effects) first.")
        rows = [self._predict(self._parts(str(condition))) for condition in conditions]
        effect = np.array([row.effect for row in rows]).reshape(len(rows), self.effects_.shape[1])
        predicted = ad.AnnData(
            effect,
            obs=pd.DataFrame(
                {"fallback": [row.fallback for row in rows]},
                index=pd.Index([str(condition) for condition in conditions], dtype=object),
            ),
            var=pd.DataFrame(index=self.effects_.columns.astype(str)),
            uns={"baseline": self.name},
        )
        if self.control_mean_ is not None:
            predicted.var["control_mean"] = self.control_mean_.to_numpy()
            predicted.layers["expression"] = effect + self.control_mean_.to_numpy()
        return predicted

    def applies_to(self, conditions: Sequence[str]) -> bool:
        """Whether the rule applies to any of these conditions, without a fallback."""
        return bool((self.predict(conditions).obs["fallback"] == "").any())

    def _fit(self) -> None:  # noqa: B027 - most rules have nothing to prepare
        """Prepare what predictions share."""

    @abstractmethod
    def _predict(self, parts: tuple[str, ...]) -> Prediction:
        """Predict one condition from its parts."""

    def _parts(self, condition: str) -> tuple[str, ...]:
        return tuple(sorted(split_label(condition, self.combination_delimiter)))

    def _measured(self, *parts: str) -> NDArray[np.float64] | None:
        """Training effect of the condition of exactly these parts."""
        row = self.row_of_.get(tuple(sorted(parts)))
        return None if row is None else self.effects_.to_numpy()[row]

    def _single_mean(self) -> NDArray[np.float64]:
        """Mean effect of the perturbations measured alone; of all conditions if none is."""
        single = [len(parts) == 1 for parts in self.parts_of_.values()]
        kept = self.effects_[single] if any(single) else self.effects_
        return kept.to_numpy().mean(axis=0)

    def _single_effects(self, parts: tuple[str, ...]) -> tuple[NDArray[np.float64], str]:
        """Effect of each part measured alone (parts x genes); the mean for parts that were not."""
        rows, unseen = [], []
        for part in parts:
            effect = self._measured(part)
            rows.append(self._single_mean() if effect is None else effect)
            if effect is None:
                unseen.append(part)
        fallback = f"{', '.join(unseen)} not measured alone: mean effect of singles"
        return np.array(rows), fallback if unseen else ""


@dataclass
class NoChange(Baseline):
    r"""Nothing happens: :math:`\hat\Delta_{cg} = 0`, the controls' profile for every condition.

    Examples
    --------
    >>> import pandas as pd
    >>> from scvi_sams.evaluation import NoChange
    >>> effects = pd.DataFrame({"GATA1": [1.0], "SPI1": [-2.0]}, index=["A"])
    >>> NoChange().fit(effects).predict(["B"]).to_df().loc["B"].tolist()
    [0.0, 0.0]
    """

    name: ClassVar[str] = "no change"

    def _predict(self, parts: tuple[str, ...]) -> Prediction:
        return Prediction(np.zeros(self.effects_.shape[1]))


@dataclass
class PerturbedMean(Baseline):
    r"""What perturbations do on average, whichever it is.

    .. math:: \hat\Delta_{cg} = \frac{1}{|P|} \sum_{p \in P} \Delta_{pg}

    over all training conditions :math:`P`, each weighted alike (:func:`perturbed_reference`).
    Ahlmann-Eltze, Huber and Anders (Nature Methods 2025), Vinas Torne et al. (Nature
    Biotechnology 2025).

    Examples
    --------
    >>> import pandas as pd
    >>> from scvi_sams.evaluation import PerturbedMean
    >>> effects = pd.DataFrame({"GATA1": [1.0, 3.0], "SPI1": [-2.0, 0.0]}, index=["A", "B"])
    >>> PerturbedMean().fit(effects).predict(["C"]).to_df().loc["C"].tolist()
    [2.0, -1.0]
    """

    name: ClassVar[str] = "perturbed mean"

    def _fit(self) -> None:
        self.mean_ = perturbed_reference(self.effects_).to_numpy()

    def _predict(self, parts: tuple[str, ...]) -> Prediction:
        return Prediction(self.mean_)


@dataclass
class ConditionMean(Baseline):
    r"""What the same condition did in training cells: :math:`\hat\Delta_{cg} = \Delta_{cg}`.

    For held-out cells of conditions that were trained on, where it is hard to beat. A condition
    that was not measured falls back to the mean of all (:class:`PerturbedMean`).

    Examples
    --------
    >>> import pandas as pd
    >>> from scvi_sams.evaluation import ConditionMean
    >>> effects = pd.DataFrame({"GATA1": [1.0, 3.0]}, index=["A", "A+B"])
    >>> ConditionMean().fit(effects).predict(["B+A"]).to_df().loc["B+A"].tolist()
    [3.0]
    """

    name: ClassVar[str] = "training mean"

    def _fit(self) -> None:
        self.mean_ = perturbed_reference(self.effects_).to_numpy()

    def _predict(self, parts: tuple[str, ...]) -> Prediction:
        measured = self._measured(*parts)
        if measured is None:
            return Prediction(self.mean_, "not measured in training: mean of all conditions")
        return Prediction(measured)


@dataclass
class AdditiveEffects(Baseline):
    r"""The sum of what the parts do alone, for any number of parts.

    .. math:: \hat\Delta_{A+B,\,g} = \Delta_{Ag} + \Delta_{Bg}

    A part that was not measured alone contributes the mean effect of those that were. Ahlmann-
    Eltze, Huber and Anders (Nature Methods 2025).

    Examples
    --------
    >>> import pandas as pd
    >>> from scvi_sams.evaluation import AdditiveEffects
    >>> effects = pd.DataFrame({"GATA1": [1.0, 3.0], "SPI1": [-2.0, 0.0]}, index=["A", "B"])
    >>> AdditiveEffects().fit(effects).predict(["A+B"]).to_df().loc["A+B"].tolist()
    [4.0, -2.0]
    """

    name: ClassVar[str] = "additive"

    def _predict(self, parts: tuple[str, ...]) -> Prediction:
        effects, fallback = self._single_effects(parts)
        return Prediction(effects.sum(axis=0), fallback)


@dataclass
class MatchingMean(Baseline):
    r"""The mean of what the parts do alone.

    .. math:: \hat\Delta_{A+B,\,g} = (\Delta_{Ag} + \Delta_{Bg}) / 2

    A part that was not measured alone contributes the mean effect of those that were. Vinas Torne
    et al., *Systema* (Nature Biotechnology 2025).

    Examples
    --------
    >>> import pandas as pd
    >>> from scvi_sams.evaluation import MatchingMean
    >>> effects = pd.DataFrame({"GATA1": [1.0, 3.0], "SPI1": [-2.0, 0.0]}, index=["A", "B"])
    >>> MatchingMean().fit(effects).predict(["A+B"]).to_df().loc["A+B"].tolist()
    [2.0, -1.0]
    """

    name: ClassVar[str] = "matching mean"

    def _predict(self, parts: tuple[str, ...]) -> Prediction:
        effects, fallback = self._single_effects(parts)
        return Prediction(effects.mean(axis=0), fallback)


@dataclass
class NearestMeasuredCombination(Baseline):
    r"""What the most similar combination did that was measured.

    Combinations are similar if their parts do similar things alone: nearest is the combination
    :math:`C + D` of the training cells, other than the one to predict, with the smallest Euclidean
    distance over genes between sums of single effects,

    .. math:: \lVert (\Delta_A + \Delta_B) - (\Delta_C + \Delta_D) \rVert_2 ,

    and its measured effect :math:`\Delta_{C+D}` is the prediction; of equally near ones the first
    of the table. Where a part, or every candidate, was not measured alone, the prediction is the
    mean of all conditions (:class:`PerturbedMean`).

    Examples
    --------
    >>> import pandas as pd
    >>> from scvi_sams.evaluation import NearestMeasuredCombination
    >>> names = ["A", "B", "C", "D", "A+C", "B+D"]
    >>> effects = pd.DataFrame({"GATA1": [1.0, 5.0, 1.2, 5.2, 2.0, 9.0]}, index=names)
    >>> NearestMeasuredCombination().fit(effects).predict(["C+D"]).to_df().loc["C+D"].tolist()
    [9.0]
    """

    name: ClassVar[str] = "nearest combination"

    def _fit(self) -> None:
        self.mean_ = perturbed_reference(self.effects_).to_numpy()
        alone = {parts[0] for parts in self.row_of_ if len(parts) == 1}
        self.candidates_ = [
            parts for parts in self.row_of_ if len(parts) > 1 and alone.issuperset(parts)
        ]
        sums = [self._single_effects(parts)[0].sum(axis=0) for parts in self.candidates_]
        self.candidate_sums_ = np.array(sums).reshape(len(sums), self.effects_.shape[1])

    def _predict(self, parts: tuple[str, ...]) -> Prediction:
        effects, unseen = self._single_effects(parts)
        if unseen:
            reason = unseen.partition(":")[0]
            return Prediction(self.mean_, f"{reason}: mean of all conditions")
        distance = np.linalg.norm(self.candidate_sums_ - effects.sum(axis=0), axis=1)
        distance[[other == parts for other in self.candidates_]] = np.inf
        if not np.isfinite(distance).any():
            return Prediction(
                self.mean_, "no other combination of measured parts: mean of all conditions"
            )
        nearest = self._measured(*self.candidates_[int(np.argmin(distance))])
        assert nearest is not None
        return Prediction(nearest)


@dataclass
class BilinearRidge(Baseline):
    r"""Bilinear ridge regression: genes and perturbations embedded by principal components.

    With :math:`Y` the training effects (genes x conditions), :math:`b` its means over conditions
    and :math:`G` (genes x k) the scores of the genes on the first :math:`k` principal components
    of :math:`Y - b`,

    .. math::

        \hat\Delta_c = G K p_c + b, \qquad
        K = (G^\top G + \lambda I)^{-1} G^\top (Y - b) P (P^\top P + \lambda I)^{-1},

    where :math:`p_c` is the row of :math:`G` of the gene that the condition perturbs, the sum of
    rows for several, and :math:`P` (conditions x k) has those of the training conditions. It
    predicts perturbations that were never measured, from how their own gene responds to others.

    A condition with a part that is not among the genes has no embedding: it is left out of the
    regression, and its prediction is :math:`b`, the mean of all conditions.

    Parameters
    ----------
    combination_delimiter
        What joins the parts of a condition; None takes every name as one part.
    n_components
        Principal components :math:`k`; fewer where the table has a lower rank.
    ridge_penalty
        Penalty :math:`\lambda` on both sides.
    perturbed_genes
        Gene that each perturbation acts on, where it is not named like it.

    Notes
    -----
    Ahlmann-Eltze, Huber and Anders (Nature Methods 2025), with their 10 components and penalty of
    0.1. They predict single perturbations; that the embedding of a combination is the sum of those
    of its parts is our extension.

    Examples
    --------
    >>> import numpy as np
    >>> import pandas as pd
    >>> from scvi_sams.evaluation import BilinearRidge
    >>> genes = ["A", "B", "C"]
    >>> effects = pd.DataFrame(np.eye(3)[:2], index=["A", "B"], columns=genes)
    >>> predicted = BilinearRidge().fit(effects).predict(["C", "unmeasured"])
    >>> predicted.to_df().loc["unmeasured"].tolist()
    [0.5, 0.5, 0.0]
    """

    n_components: int = 10
    ridge_penalty: float = 0.1
    perturbed_genes: Mapping[str, str] | None = None

    name: ClassVar[str] = "bilinear ridge"

    def __post_init__(self) -> None:
        if self.n_components < 1:
            raise ValueError(f"n_components={self.n_components} must be at least 1.")
        if self.ridge_penalty <= 0:
            raise ValueError(f"ridge_penalty={self.ridge_penalty} must be above 0.")

    def _fit(self) -> None:
        response = self.effects_.to_numpy().T
        self.mean_ = response.mean(axis=1)
        centred = response - self.mean_[:, None]
        left, singular, _ = np.linalg.svd(centred, full_matrices=False)
        used = np.flatnonzero(singular > 1e-10 * singular.max(initial=1e-300))
        used = used[: self.n_components]
        self.gene_embedding_ = left[:, used] * singular[used]
        row_of_gene = {str(gene): row for row, gene in enumerate(self.effects_.columns)}
        self.gene_row_ = row_of_gene | {
            perturbation: row_of_gene[gene]
            for perturbation, gene in (self.perturbed_genes or {}).items()
            if gene in row_of_gene
        }
        embeddings = [self._embedding(parts) for parts in self.parts_of_.values()]
        embedded = [row for row, embedding in enumerate(embeddings) if embedding is not None]
        self.coefficients_: NDArray[np.float64] | None = None
        if embedded and used.size:
            genes = self.gene_embedding_
            conditions = np.array([embeddings[row] for row in embedded])
            penalty = self.ridge_penalty * np.eye(used.size)
            left_side = np.linalg.solve(genes.T @ genes + penalty, genes.T @ centred[:, embedded])
            self.coefficients_ = np.linalg.solve(
                conditions.T @ conditions + penalty, (left_side @ conditions).T
            ).T

    def _predict(self, parts: tuple[str, ...]) -> Prediction:
        embedding = self._embedding(parts)
        if embedding is None:
            absent = [part for part in parts if part not in self.gene_row_]
            return Prediction(
                self.mean_, f"{', '.join(absent)} not among the genes: mean of all conditions"
            )
        if self.coefficients_ is None:
            return Prediction(
                self.mean_, "no training condition among the genes: mean of all conditions"
            )
        return Prediction(self.mean_ + self.gene_embedding_ @ (self.coefficients_ @ embedding))

    def _embedding(self, parts: tuple[str, ...]) -> NDArray[np.float64] | None:
        if not all(part in self.gene_row_ for part in parts):
            return None
        rows = [self.gene_row_[part] for part in parts]
        return np.asarray(self.gene_embedding_[rows].sum(axis=0))
