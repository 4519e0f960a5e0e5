"""Pairs of perturbations against the sum of their parts."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd

from scvi_sams._arguments import checked
from scvi_sams._exceptions import ScreenError, unknown_perturbations
from scvi_sams.data.conditions import split_label
from scvi_sams.data.tables import profile_frame
from scvi_sams.model.read_outs import check_level, pairs_together, provenance
from scvi_sams.tl._control_null import null_perturbations
from scvi_sams.tl.pair_calibration import calibrated_summary, widen_interval
from scvi_sams.tl.pair_draws import model_errors, pair_draws, parse_pairs, require_pairs
from scvi_sams.tl.pair_statistics import (
    DEFAULT_THRESHOLDS,
    PAIR_CLASSES,
    pair_class,
    pair_summary,
    regress_pair,
)
from scvi_sams.tl.summaries import summarize_effects

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scvi_sams.data import Conditions
    from scvi_sams.data.tables import ProfileTable
    from scvi_sams.model import SAMSVAE
    from scvi_sams.model.counterfactual import Counterfactual
    from scvi_sams.tl.pair_calibration import PairCalibration
    from scvi_sams.tl.pair_draws import Calibration, Pairs
    from scvi_sams.tl.pair_statistics import PairThresholds
    from scvi_sams.tl.summaries import EffectSummary

_N_CELLS_OF_MANY = 50  # where every pair is decoded

_Draws = tuple[np.ndarray, np.ndarray, np.ndarray]


def pair_interactions(
    model: SAMSVAE,
    pairs: Pairs,
    n_samples: int = 50,
    credible_level: float = 0.95,
    thresholds: PairThresholds = DEFAULT_THRESHOLDS,
    *,
    calibration: Calibration = "measured",
    counterfactual: Counterfactual | None = None,
) -> ad.AnnData:
    r"""Effects of pairs beyond the sum of the effects of their parts.

    .. math:: \varepsilon_{AB} = \delta_{AB} - \delta_A - \delta_B

    with all effects on the same basal states and from the same draw of masks and effects, on the
    scale of :meth:`SAMSVAE.get_average_treatment_effect`. Shifts add up in latent space. A pair
    therefore departs from additivity by the curvature of the decoder alone, unless the model was
    made with ``interactions=True``, when a measured pair has a shift of its own too; one that was
    not measured still has none.

    Draws of masks and effects take the decoder as known, which makes most of the deviation, and
    their intervals alone are far too narrow (``python -m benchmarks pair_interactions``). So the
    errors of the decoder are learned from measured pairs, whose observed deviation is compared
    with the model's,

    .. math::
        \mathrm E\,(\hat\varepsilon_{pg} - \bar\varepsilon_{pg})^2
            = s_{pg}^2 + \alpha^2 + \beta^2 (\bar\delta_{Ag}^2 + \bar\delta_{Bg}^2),

    with :math:`s` the standard error of the observed, and :math:`\alpha, \beta` by weighted least
    squares; likewise one variance :math:`\tau^2` of the interaction score, by the estimator of
    Paule and Mandel (1982). Either half :math:`h` of an interval becomes
    :math:`\sqrt{h^2 + q^2 \tau^2}`, with :math:`q` a quantile of Student's t with as many degrees
    of freedom as pairs. A measured pair is not among those that widen its own interval.

    Eight measured pairs are needed that have no shift of their own, of ten cells or more, with as
    many of both parts alone (at the same doses) and of controls. Where there are fewer, or the
    pair asked for has a shift of its own, intervals are those of masks and effects alone, a lower
    bound, and ``obs["calibrated"]`` is False. Pairs that the model was trained on flatter it a
    little: give cells that it has not seen where there are such. Cells of a pair that come from
    other batches than the controls make intervals wider than they need be.

    Parameters
    ----------
    model
        A trained model whose perturbations act by a shift.
    pairs
        Labels (``"A+B"``), two names each, or two doses each; measured or not.
    n_samples
        Draws of masks and effects, two at least.
    credible_level
        Level of the intervals.
    thresholds
        Where the kinds of interaction end.
    calibration
        Cells whose pairs say how far the decoder errs: ``"measured"`` for those of the model's
        AnnData, an AnnData of other cells (held-out pairs, say), or ``None`` for intervals of
        masks and effects alone, which saves a pass over the cells.
    counterfactual
        The cells, from :meth:`SAMSVAE.counterfactual`; 200 basal states from the prior by default.

    Returns
    -------
    anndata.AnnData
        Pairs x genes, with the posterior mean of :math:`\varepsilon` in ``X``. ``layers``:
        ``lower``, ``upper`` and ``std`` of it, ``effect`` (of the pair) and ``additive`` (sum of
        the parts), both posterior means. ``obs``, with posterior means of numbers:

        * ``first``, ``second``
        * ``measured``: whether cells of the model's AnnData have both; missing without it
        * ``calibrated``: whether intervals, ``std``, ``surprise`` and ``uncertainty`` hold the
          errors of the decoder (class probabilities never do)
        * the columns of :func:`classify_pairs`, among them ``interaction_score``
        * ``interaction_score_lower``, ``interaction_score_upper``: its interval
        * ``probability_<kind>`` of each kind of interaction, the most probable one as ``class``,
          and its ``class_probability``
        * ``surprise``: root of the expected squared deviation from additivity, summed over genes,
          which is ``expected_deviation`` squared plus ``uncertainty`` squared

    Raises
    ------
    NotImplementedError
        If perturbations do not act by a shift, and have no posterior (ConditionalVAE), or every
        combination is a perturbation of its own (SVAEPlus by default).
    UnknownPerturbationError
        If a pair names a perturbation that the model has not seen.
    ScreenError
        If what is given as a pair is not two perturbations, or an argument cannot be used.
    ValueError
        If ``credible_level`` is not between 0 and 1.

    Examples
    --------
    >>> found = scvi_sams.tl.pair_interactions(model, ["KLF1+CEBPA"])  # doctest: +SKIP
    >>> found.obs[["interaction_score", "class", "class_probability"]]  # doctest: +SKIP
    >>> found.to_df().loc["KLF1+CEBPA"].nlargest(10)  # doctest: +SKIP
    """
    require_pairs(model, "pair_interactions")
    asked, n_samples = parse_pairs(model, pairs), checked("n_samples", n_samples)
    check_level(credible_level)
    cells = model.counterfactual() if counterfactual is None else counterfactual
    rows = []
    columns: dict[str, list[np.ndarray]] = {
        name: [] for name in ("mean", "lower", "upper", "std", "effect", "additive")
    }
    calibrations = _calibrations(model, asked, calibration, cells.seed)
    drawn = pair_draws(cells, asked.index[:, :2], asked.dose[:, :2], n_samples)
    for draws, errors in zip(drawn, calibrations, strict=True):
        rows.append(_summary(draws, credible_level, thresholds, errors))
        first, second, pair = draws
        summary = summarize_effects(pair - first - second, credible_level)
        if errors is not None:
            summary = _with_errors(summary, first.mean(0), second.mean(0), errors, credible_level)
        for name in ("mean", "lower", "upper", "std"):
            columns[name].append(getattr(summary, name))
        columns["effect"].append(pair.mean(0))
        columns["additive"].append((first + second).mean(0))
    layers = {name: np.stack(values).astype(np.float32) for name, values in columns.items()}
    found = ad.AnnData(
        layers.pop("mean"),
        obs=_pair_obs(model, asked, rows),
        var=pd.DataFrame(index=pd.Index(model.get_var_names())),
        layers=layers,
    )
    found.uns["scvi_sams"] = provenance(model, cells.seed) | {
        "credible_level": credible_level,
        "units": cells.units,
        "thresholds": thresholds._asdict(),
        "n_calibration_pairs": _n_pairs(calibrations),
    }
    return found


def rank_unmeasured_pairs(
    model: SAMSVAE,
    perturbations: Sequence[str] | None = None,
    n_pairs: int | None = None,
    n_samples: int = 10,
    credible_level: float = 0.95,
    thresholds: PairThresholds = DEFAULT_THRESHOLDS,
    *,
    calibration: Calibration = "measured",
    counterfactual: Counterfactual | None = None,
) -> pd.DataFrame:
    r"""Pairs that nobody measured, the most surprising first.

    Ranked by the error to expect of adding up the effects of the parts, which is what is expected
    to be non-additive and what is unknown of it,
    :math:`\mathrm E|\varepsilon|^2 = |\mathrm E\varepsilon|^2
    + \operatorname{tr}\operatorname{Cov}\varepsilon`. As shifts add up in latent space, this is
    the curvature of the decoder at work: saturation of shared latents, and strong effects that
    meet in the same genes. Epistasis that no latent state of a measured cell shows is beyond it,
    whether or not the model has ``interactions``. What is unknown is that of masks and effects
    and, where enough pairs were measured, the errors of the decoder (``calibrated``), as in
    :func:`pair_interactions`.

    Parameters
    ----------
    model
        A trained model whose perturbations act by a shift.
    perturbations
        Perturbations to pair; all by default, but for null perturbations made of controls.
    n_pairs
        Number of pairs to return; all by default.
    n_samples
        Draws of masks and effects; the time is proportional to it, to the number of cells and to
        the square of the number of perturbations.
    credible_level, thresholds, calibration
        As in :func:`pair_interactions`.
    counterfactual
        The cells, from :meth:`SAMSVAE.counterfactual`; 50 basal states from the prior by default.

    Returns
    -------
    pandas.DataFrame
        A row a pair, by falling ``surprise``, with the columns of :func:`pair_interactions` but
        for ``measured``.

    Raises
    ------
    ScreenError
        If the model was loaded without its AnnData, or every pair was measured; else as
        :func:`pair_interactions`.

    Examples
    --------
    >>> scvi_sams.tl.rank_unmeasured_pairs(model, n_pairs=20)  # doctest: +SKIP
    """
    require_pairs(model, "rank_unmeasured_pairs")
    names = model.perturbation_names
    nulls = set(null_perturbations(names))
    chosen = [n for n in names if n not in nulls] if perturbations is None else perturbations
    if unknown := [name for name in chosen if name not in names]:
        raise unknown_perturbations(unknown, names)
    n_pairs, n_samples = checked("n_pairs", n_pairs), checked("n_samples", n_samples)
    if model.adata is None:
        raise ScreenError(
            "Which pairs were measured is in the AnnData, and the model was loaded without it: "
            "load it with its AnnData, or ask pair_interactions() for given pairs."
        )
    measured = set(pairs_together(model))
    candidates = [
        (names[a], names[b])
        for a, b in combinations(sorted({names.index(name) for name in chosen}), 2)
        if (a, b) not in measured
    ]
    if not candidates:
        raise ScreenError(
            f"No pair of these {len(chosen)} perturbations is unmeasured: name more of them."
        )
    asked = parse_pairs(model, candidates)
    check_level(credible_level)
    cells = counterfactual or model.counterfactual(n_cells=_N_CELLS_OF_MANY)
    calibrations = _calibrations(model, asked, calibration, cells.seed)
    drawn = pair_draws(cells, asked.index[:, :2], asked.dose[:, :2], n_samples)
    rows = [
        _summary(draws, credible_level, thresholds, errors)
        for draws, errors in zip(drawn, calibrations, strict=True)
    ]
    table = _pair_obs(model, asked, rows).drop(columns="measured")
    table = table.sort_values("surprise", ascending=False, kind="stable").iloc[:n_pairs]
    table.attrs = provenance(model, cells.seed) | {
        "units": cells.units,
        "n_calibration_pairs": _n_pairs(calibrations),
    }
    return table


def _calibrations(
    model: SAMSVAE, asked: Conditions, calibration: Calibration, seed: int | None
) -> list[PairCalibration | None]:
    """Variances of the model's errors for each pair; none where they are unknown."""
    errors = model_errors(model, calibration, seed)
    if errors is None:
        return [None] * len(asked.labels)
    return errors.of(asked.index[:, :2], asked.dose[:, :2])


def _summary(
    draws: _Draws,
    credible_level: float,
    thresholds: PairThresholds,
    errors: PairCalibration | None,
) -> dict[str, float | str | bool]:
    """Summary of a pair, with the errors of the decoder where they are known."""
    summary = pair_summary(*draws, credible_level, thresholds)
    if errors is not None:
        parts = draws[0].mean(0), draws[1].mean(0)
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
    variance = errors.deviation_variance(first, second)
    lower, upper = widen_interval(
        summary.mean, summary.lower, summary.upper, variance, errors.n_pairs, credible_level
    )
    std = np.sqrt(summary.std**2 + variance)
    return summary._replace(lower=lower, upper=upper, std=std)


def _pair_obs(
    model: SAMSVAE,
    asked: Conditions,
    rows: list[dict[str, float | str | bool]],
) -> pd.DataFrame:
    """Names of the parts, whether they were measured together, and the summary of each pair."""
    names = np.asarray(model.perturbation_names, object)
    first, second = asked.index[:, :2].T
    measured = None if model.adata is None else set(pairs_together(model))
    obs = pd.DataFrame(
        {"first": names[first], "second": names[second]},
        index=pd.Index(asked.labels, name="pair"),
    )
    pairs = zip(first.tolist(), second.tolist(), strict=True)
    obs["measured"] = pd.array(
        [None if measured is None else pair in measured for pair in pairs], dtype="boolean"
    )
    table = pd.DataFrame(rows, index=obs.index)
    table["class"] = pd.Categorical(table["class"], categories=PAIR_CLASSES)
    return obs.join(table)


def _n_pairs(calibrations: Sequence[PairCalibration | None]) -> int:
    """Measured pairs that the errors were learned from, 0 where they are not known."""
    return max((errors.n_pairs for errors in calibrations if errors is not None), default=0)


def classify_pairs(
    effects: ProfileTable,
    pairs: Sequence[str] | None = None,
    thresholds: PairThresholds = DEFAULT_THRESHOLDS,
    combination_delimiter: str = "+",
) -> pd.DataFrame:
    r"""Compare the effects of pairs with those of their parts, and name the kind of interaction.

    With :math:`\delta_{AB} = c_1 \delta_A + c_2 \delta_B + \text{rest}`, by least squares over
    genes and shrunk a little towards additivity (:math:`c_1 = c_2 = 1`), the first rule that holds
    gives the kind:

    * *additive*: the pair deviates from :math:`\delta_A + \delta_B` by less than a fifth
      (``relative_deviation``)
    * *neomorphic*: the parts explain less than half of the pair (``fit``)
    * *epistatic*: one part masks the other: the coefficients differ by a factor of 3 or more and
      the smaller is at most one half (``dominance``)
    * *synergistic*: more than the sum, along the sum (``interaction_score`` above 0)
    * *buffering*: less than the sum

    Parameters
    ----------
    effects
        Conditions x genes, effects against the controls, predicted or observed, with the parts of
        each pair.
    pairs
        Pairs wanted; by default all whose parts are in `effects` too.
    thresholds
        Where the kinds end.
    combination_delimiter
        What joins the parts.

    Returns
    -------
    pandas.DataFrame
        A row a pair: ``first``, ``second`` and

        * ``coefficient_1``, ``coefficient_2``: of the parts; 1 if additive
        * ``magnitude``: length of the two; the square root of 2 if additive
        * ``dominance``: absolute log10 ratio of their sizes; 0 if additive
        * ``fit``: 1 less the part of the pair that they do not explain; 1 if additive
        * ``similarity``: cosine of the pair and the sum of its parts; 1 if additive
        * ``interaction_score``: deviation along the sum of the parts, in units of that sum
        * ``deviation``: length of the deviation from the sum, in the units of the effects
        * ``relative_deviation``: the same over the length of the sum or of the pair, whichever is
          longer
        * ``class``: the kind, a categorical

    Raises
    ------
    ScreenError
        If a pair is not in `effects` with its parts, or has more than two.

    Notes
    -----
    The kinds and the coefficients they rest on are from Norman et al. (Science 365, 786, 2019).
    The thresholds are this package's: the paper orders pairs along a continuum. Observed effects
    of few cells deviate by noise alone and come out as neomorphic:
    :func:`~scvi_sams.evaluation.interaction_residuals` has standard errors.

    Examples
    --------
    >>> import pandas as pd
    >>> from scvi_sams.tl import classify_pairs
    >>> effects = pd.DataFrame(
    ...     {"GATA1": [1.0, 0.0, 1.6], "MYC": [0.0, 1.0, 1.5]}, index=["A", "B", "A+B"]
    ... )
    >>> classify_pairs(effects)[["magnitude", "interaction_score", "class"]].round(2)
         magnitude  interaction_score        class
    A+B       2.18               0.55  synergistic
    """
    frame = profile_frame(effects, "effects")
    parts = _parts_of_pairs(frame.index, pairs, combination_delimiter)
    first, second = (list(side) for side in zip(*parts.values(), strict=True))
    rows = (first, second, list(parts))
    regression = regress_pair(*(frame.loc[names].to_numpy() for names in rows))
    table = pd.DataFrame(
        {"first": first, "second": second} | regression._asdict(), index=pd.Index(parts)
    )
    table["class"] = pd.Categorical.from_codes(pair_class(regression, thresholds), PAIR_CLASSES)
    return table


def _parts_of_pairs(
    conditions: pd.Index, pairs: Sequence[str] | None, delimiter: str
) -> dict[str, list[str]]:
    """The two parts of each pair, by its label."""
    known = set(conditions)
    wanted = map(str, conditions if pairs is None else pairs)
    parts = {name: split_label(name, delimiter) for name in wanted}
    if pairs is None:
        parts = {n: of_n for n, of_n in parts.items() if len(of_n) == 2 and known.issuperset(of_n)}
        if not parts:
            raise ScreenError(
                f"No condition of `effects` joins two parts by {delimiter!r} that are both among "
                "its conditions: add the single perturbations."
            )
    for name, of_name in parts.items():
        if len(of_name) != 2:
            raise ScreenError(f"{name!r} is no pair joined by {delimiter!r}.")
        if lacking := [each for each in (name, *of_name) if each not in known]:
            raise ScreenError(f"{name!r} needs {lacking[0]!r}, which is not in `effects`.")
    return parts
