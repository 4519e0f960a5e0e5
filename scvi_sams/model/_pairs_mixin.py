"""Pairs of perturbations against the sum of their parts."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Literal

import anndata as ad
import numpy as np
import pandas as pd
import torch

from scvi_sams._exceptions import ScreenError, unknown_perturbations
from scvi_sams.model._pair_draws_mixin import PairDrawsMixin
from scvi_sams.tl import (
    PAIR_CLASSES,
    PairThresholds,
    null_perturbations,
    pair_summary,
    summarize_effects,
)
from scvi_sams.tl._pair_calibration import calibrated_summary, widen_interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from scipy import sparse

    from scvi_sams.model._pair_draws_mixin import Calibration, Pairs
    from scvi_sams.tl import EffectSummary
    from scvi_sams.tl._pair_calibration import PairCalibration

__all__ = ["PairsMixin"]

_THRESHOLDS = PairThresholds()


class PairsMixin(PairDrawsMixin):
    """Interactions of perturbations, measured or not."""

    @torch.inference_mode()
    def get_pair_interactions(
        self,
        pairs: Pairs,
        n_samples: int = 50,
        n_cells: int = 200,
        credible_level: float = 0.95,
        thresholds: PairThresholds = _THRESHOLDS,
        basal: Literal["prior", "control"] | AnnData | Sequence[int] = "prior",
        batch: str | None = None,
        *,
        seed: int = 0,
        calibration: Calibration = "measured",
    ) -> AnnData:
        r"""Effects of pairs beyond the sum of the effects of their parts.

        .. math:: \varepsilon_{AB} = \delta_{AB} - \delta_A - \delta_B

        with all effects on the same basal states and from the same draw of masks and effects, on
        the scale of :meth:`get_average_treatment_effect`. Shifts add up in latent space. A pair
        therefore departs from additivity by the curvature of the decoder alone, unless the model
        was made with ``interactions=True``, when a measured pair has a shift of its own too; one
        that was not measured still has none.

        Draws of masks and effects take the decoder as known, which makes most of the deviation.
        Their intervals alone are far too narrow: on three simulated screens, those of 95% held
        the true deviation of 65% of the genes and the true score of 11% of the unmeasured pairs.
        So the errors of the decoder are learned from measured pairs, whose observed deviation is
        compared with the model's,

        .. math::
            \mathrm E\,(\hat\varepsilon_{pg} - \bar\varepsilon_{pg})^2
                = s_{pg}^2 + \alpha^2 + \beta^2 (\bar\delta_{Ag}^2 + \bar\delta_{Bg}^2),

        with :math:`s` the standard error of the observed, and :math:`\alpha, \beta` by weighted
        least squares; likewise one variance :math:`\tau^2` of the interaction score, by the
        estimator of Paule and Mandel (1982). Either half :math:`h` of an interval becomes
        :math:`\sqrt{h^2 + q^2 \tau^2}`, with :math:`q` a quantile of Student's t with as many
        degrees of freedom as pairs. On the same screens, with twenty measured pairs, those of 95%
        then held 93% and 96% (of 80%: 78% and 87%; of 50%: 50% and 60%; a screen by itself 86%
        to 97% and 88% to 100% of 95%), as ``python -m benchmarks pair_interactions`` prints. A
        measured pair is not among those that widen its own interval.

        Eight measured pairs are needed that have no shift of their own, of ten cells or more,
        with as many of both parts alone (at the same doses) and of controls. Where there are
        fewer, or the pair asked for has a shift of its own, intervals are those of masks and
        effects alone, a lower bound, and ``obs["calibrated"]`` is False. Pairs that the model was
        trained on flatter it a little: give cells that it has not seen where there are such.
        Cells of a pair that come from other batches than the controls make intervals wider than
        they need be.

        Parameters
        ----------
        pairs
            Labels (``"A+B"``), two names each, or two doses each; measured or not.
        n_samples
            Draws of masks and effects, two at least.
        n_cells
            Cells of the population. Ignored if ``basal`` is cells.
        credible_level
            Level of the intervals.
        thresholds
            Where the kinds of interaction end.
        basal, batch
            Where basal states come from, and the batch, as in :meth:`predict`.
        seed
            Seed of the population and of the draws.
        calibration
            Cells whose pairs say how far the decoder errs: ``"measured"`` for those of the
            model's AnnData, an AnnData of other cells (held-out pairs, say), or ``None`` for
            intervals of masks and effects alone, which saves a pass over the cells.

        Returns
        -------
        AnnData, pairs x genes, with the posterior mean of :math:`\varepsilon` in ``X``.
        ``layers``: ``lower``, ``upper`` and ``std`` of it, ``effect`` (of the pair) and
        ``additive`` (sum of the parts), both posterior means. ``obs``: ``first``, ``second``,
        ``measured`` (whether cells of the model's AnnData have both; missing without it),
        ``calibrated`` (whether intervals, ``std``, ``surprise`` and ``uncertainty`` hold the
        errors of the decoder; class probabilities never do) and the columns of
        :func:`~scvi_sams.tl.pair_summary`, among them
        ``interaction_score`` with its interval, ``class`` and ``class_probability``; see
        :func:`~scvi_sams.tl.classify_pairs` for what the kinds are.

        Raises
        ------
        NotImplementedError
            If perturbations do not act by a shift, and have no posterior (ConditionalVAE), or
            every combination is a perturbation of its own (SVAEPlus by default).
        UnknownPerturbationError
            If a pair names a perturbation that the model has not seen.
        ScreenError
            If what is given as a pair is not two perturbations, or an argument cannot be used.
        ValueError
            If ``credible_level`` is not between 0 and 1.

        Examples
        --------
        >>> found = model.get_pair_interactions(["KLF1+CEBPA"])  # doctest: +SKIP
        >>> found.obs[["interaction_score", "class", "class_probability"]]  # doctest: +SKIP
        >>> found.to_df().loc["KLF1+CEBPA"].nlargest(10)  # doctest: +SKIP
        """
        self._require_pairs("get_pair_interactions")
        dosage, labels = self._parse_pairs(pairs)
        rows: list[dict[str, float | str | bool]] = []
        columns: dict[str, list[np.ndarray]] = {
            name: [] for name in ("mean", "lower", "upper", "std", "effect", "additive")
        }
        drawn = self._pair_draws(dosage, n_samples, n_cells, credible_level, basal, batch, seed)
        calibrations = self._calibrations(dosage, calibration, seed)
        for (first, second, pair), errors in zip(drawn, calibrations, strict=True):
            rows.append(_summary(first, second, pair, credible_level, thresholds, errors))
            summary = summarize_effects(pair - first - second, credible_level)
            if errors is not None:
                summary = _with_errors(summary, first, second, errors, credible_level)
            for name in ("mean", "lower", "upper", "std"):
                columns[name].append(getattr(summary, name))
            columns["effect"].append(pair.mean(0))
            columns["additive"].append((first + second).mean(0))
        layers = {name: np.stack(values).astype(np.float32) for name, values in columns.items()}
        found = ad.AnnData(
            layers.pop("mean"),
            obs=self._pair_obs(dosage, labels, rows),
            var=pd.DataFrame(index=pd.Index(self.get_var_names())),
            layers=layers,
        )
        found.uns["scvi_sams"] = self._provenance() | {
            "seed": seed,
            "credible_level": credible_level,
            "units": self._expression_units,
            "thresholds": thresholds._asdict(),
            "n_calibration_pairs": _n_pairs(calibrations),
        }
        return found

    @torch.inference_mode()
    def rank_unmeasured_pairs(
        self,
        perturbations: Sequence[str] | None = None,
        n_pairs: int | None = None,
        n_samples: int = 10,
        n_cells: int = 50,
        credible_level: float = 0.95,
        thresholds: PairThresholds = _THRESHOLDS,
        basal: Literal["prior", "control"] | AnnData | Sequence[int] = "prior",
        batch: str | None = None,
        *,
        seed: int = 0,
        calibration: Calibration = "measured",
    ) -> pd.DataFrame:
        r"""Pairs that nobody measured, the most surprising first.

        Ranked by the error to expect of adding up the effects of the parts, which is what is
        expected to be non-additive and what is unknown of it,
        :math:`\mathrm E|\varepsilon|^2 = |\mathrm E\varepsilon|^2
        + \operatorname{tr}\operatorname{Cov}\varepsilon`
        (:func:`~scvi_sams.tl.expected_surprise`). As shifts add up in latent space,
        this is the curvature of the decoder at work: saturation of shared latents, and strong
        effects that meet in the same genes. Epistasis that no latent state of a measured cell
        shows is beyond it, whether or not the model has ``interactions``. What is unknown is that
        of masks and effects and, where enough pairs were measured, the errors of the decoder
        (``calibrated``), as in :meth:`get_pair_interactions`.

        Parameters
        ----------
        perturbations
            Perturbations to pair; all by default, but for null perturbations made of controls.
        n_pairs
            Number of pairs to return; all by default.
        n_samples, n_cells
            Draws and cells, as in :meth:`get_pair_interactions`; the time is proportional to
            both, and to the square of the number of perturbations.
        credible_level, thresholds, basal, batch, seed, calibration
            As in :meth:`get_pair_interactions`.

        Returns
        -------
        A row a pair, by falling ``surprise``: ``first``, ``second``, ``calibrated`` and the
        columns of :func:`~scvi_sams.tl.pair_summary`.

        Raises
        ------
        NotImplementedError
            If perturbations do not act by a shift, and have no posterior (ConditionalVAE), or
            every combination is a perturbation of its own (SVAEPlus by default).
        UnknownPerturbationError
            If ``perturbations`` names one that the model has not seen.
        ScreenError
            If the model was loaded without its AnnData, every pair was measured, or an argument
            cannot be used.
        ValueError
            If ``credible_level`` is not between 0 and 1.

        Examples
        --------
        >>> model.rank_unmeasured_pairs(n_pairs=20)  # doctest: +SKIP
        """
        self._require_pairs("rank_unmeasured_pairs")
        names = self.perturbation_names
        nulls = set(null_perturbations(names))
        chosen = [n for n in names if n not in nulls] if perturbations is None else perturbations
        if unknown := [name for name in chosen if name not in names]:
            raise unknown_perturbations(unknown, names)
        if n_pairs is not None and n_pairs < 1:
            raise ScreenError(f"n_pairs={n_pairs}: at least one is needed.")
        measured = self._measured_pairs()
        if measured is None:
            raise ScreenError(
                "Which pairs were measured is in the AnnData, and the model was loaded without "
                "it: load it with its AnnData, or ask get_pair_interactions() for given pairs."
            )
        candidates = [
            (names[a], names[b])
            for a, b in combinations(sorted({names.index(name) for name in chosen}), 2)
            if (a, b) not in measured
        ]
        if not candidates:
            raise ScreenError(
                f"No pair of these {len(chosen)} perturbations is unmeasured: name more of them."
            )
        dosage, labels = self._parse_pairs(candidates)
        drawn = self._pair_draws(dosage, n_samples, n_cells, credible_level, basal, batch, seed)
        calibrations = self._calibrations(dosage, calibration, seed)
        rows = [
            _summary(*effects, credible_level, thresholds, errors)
            for effects, errors in zip(drawn, calibrations, strict=True)
        ]
        table = self._pair_obs(dosage, labels, rows).drop(columns="measured")
        table = table.sort_values("surprise", ascending=False, kind="stable").iloc[:n_pairs]
        table.attrs = self._provenance() | {
            "seed": seed,
            "units": self._expression_units,
            "n_calibration_pairs": _n_pairs(calibrations),
        }
        return table

    # -- shared steps --------------------------------------------------------------------------

    def _pair_obs(
        self,
        dosage: sparse.csr_matrix,
        labels: list[str],
        rows: list[dict[str, float | str | bool]],
    ) -> pd.DataFrame:
        names = np.asarray(self.perturbation_names, object)
        columns = dosage.indices.reshape(-1, 2)
        obs = pd.DataFrame(
            {"first": names[columns[:, 0]], "second": names[columns[:, 1]]},
            index=pd.Index(labels, name="pair"),
        )
        measured = self._measured_pairs()
        obs["measured"] = pd.array(
            [None if measured is None else (min(c), max(c)) in measured for c in columns.tolist()],
            dtype="boolean",
        )
        table = pd.DataFrame(rows, index=obs.index)
        table["class"] = pd.Categorical(table["class"], categories=PAIR_CLASSES)
        return obs.join(table)


def _summary(
    first: np.ndarray,
    second: np.ndarray,
    pair: np.ndarray,
    credible_level: float,
    thresholds: PairThresholds,
    errors: PairCalibration | None,
) -> dict[str, float | str | bool]:
    """Summary of a pair, with the errors of the decoder where they are known."""
    summary = pair_summary(first, second, pair, credible_level, thresholds)
    if errors is not None:
        parts = first.mean(0), second.mean(0)
        summary = calibrated_summary(summary, *parts, errors, credible_level)
    return {"calibrated": errors is not None, **summary}


def _with_errors(
    summary: EffectSummary,
    first: np.ndarray,
    second: np.ndarray,
    errors: PairCalibration,
    credible_level: float,
) -> EffectSummary:
    """Interval and spread of the deviation of each gene, with the errors of the decoder."""
    variance = errors.deviation_variance(first.mean(0), second.mean(0))
    lower, upper = widen_interval(
        summary.mean, summary.lower, summary.upper, variance, errors.n_pairs, credible_level
    )
    std = np.sqrt(summary.std**2 + variance)
    return summary._replace(lower=lower, upper=upper, std=std)


def _n_pairs(calibrations: Sequence[PairCalibration | None]) -> int:
    """Measured pairs that the errors were learned from, 0 where they are not known."""
    return max((errors.n_pairs for errors in calibrations if errors is not None), default=0)
