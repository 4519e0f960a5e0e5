"""Measures of predicted against observed effects, each condition by itself."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.spatial.distance import cdist
from scipy.stats import norm

from scvi_sams._exceptions import ScreenError
from scvi_sams.data.conditions import split_label
from scvi_sams.data.tables import (
    aligned_profiles,
    dense,
    profile_frame,
    ratio,
    relative_to,
    row_correlation,
    row_of_genes,
    standard_error_frames,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from numpy.typing import NDArray

    from scvi_sams.data.tables import ProfileTable


# -- agreement of effects ------------------------------------------------------------------------


def effect_correlation(predicted: ProfileTable, observed: ProfileTable) -> float:
    r"""Pearson correlation of predicted and observed effects, over all conditions and genes.

    .. math:: r = \mathrm{cor}\bigl( (\hat\Delta_{cg})_{c,g},\ (\Delta_{cg})_{c,g} \bigr)

    The measure of Bereket and Karaletsos (NeurIPS 2023). Large effects dominate it.

    Parameters
    ----------
    predicted
        Conditions x genes, predicted effects: ``X`` of an AnnData, or a DataFrame.
    observed
        Likewise, as from :func:`observed_effects`, with every condition and gene of ``predicted``,
        in any order.

    Returns
    -------
    float
        Correlation between -1 and 1; NaN if either side is constant.

    Raises
    ------
    ScreenError
        If a condition or gene of ``predicted`` is not in ``observed``.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=500)
    >>> effect = scvi_sams.evaluation.observed_effects(adata, "perturbation", "control")
    >>> round(scvi_sams.evaluation.effect_correlation(effect[["P002", "P001"]], effect), 6)
    1.0
    """
    return float(effect_agreement(predicted, observed, pooled=True)["pearson"].iloc[0])


def effect_agreement(
    predicted: ProfileTable,
    observed: ProfileTable,
    reference: pd.Series | None = None,
    weights: ProfileTable | None = None,
    n_top_genes: int = 20,
    ranking: ProfileTable | None = None,
    pooled: bool = False,
) -> pd.DataFrame:
    r"""Correlation and error of predicted effects, one condition at a time.

    With :math:`\delta_{cg} = \Delta_{cg} - m_g` the observed effects relative to a reference
    :math:`m`, :math:`\hat\delta` the predicted ones, :math:`w` weights (or 1) and
    :math:`\bar\delta_c` the weighted mean over the genes of a condition,

    .. math::

        \mathrm{pearson} &= \mathrm{cor}_g(\hat\delta_{cg}, \delta_{cg}), &
        \mathrm{relative\ squared\ error} &=
            \frac{\sum_g (\hat\delta_{cg} - \delta_{cg})^2}{\sum_g \delta_{cg}^2}, \\
        \mathrm{weighted\ mse} &=
            \frac{\sum_g w_{cg} (\hat\delta_{cg} - \delta_{cg})^2}{\sum_g w_{cg}}, &
        R^2 &= 1 - \frac{\sum_g w_{cg} (\hat\delta_{cg} - \delta_{cg})^2}
            {\sum_g w_{cg} (\delta_{cg} - \bar\delta_c)^2}.

    Unlike a correlation an error sees the size of effects: it is 1 for no effect at all.

    Parameters
    ----------
    predicted, observed
        As for :func:`effect_correlation`.
    reference
        Profile :math:`m` that is subtracted from both sides, a Series named by genes. With the
        mean effect of the training conditions (``effects.to_df().mean()``), what all perturbations
        have in common earns nothing.
    weights
        Conditions x genes, 0 or more: see :func:`differential_expression_weights`. Without it
        there are no weighted measures.
    n_top_genes
        Genes of a condition that count as its strongest.
    ranking
        Conditions x genes, effects whose absolute values say which genes are strongest;
        ``observed`` by default. Those of other cells do not favour genes whose observed effect is
        large by chance.
    pooled
        One row, ``"all"``, as if all conditions were one.

    Returns
    -------
    pandas.DataFrame
        By condition: ``pearson``, ``r2`` and ``relative_squared_error`` over all genes,
        ``pearson_top`` and ``r2_top`` over the strongest, with weights ``weighted_mse`` and
        ``weighted_r2``, and ``n_cells`` where ``observed.obs`` has it. NaN where a denominator is
        0.

    Raises
    ------
    ScreenError
        If another table lacks a condition or gene, or a weight is negative or not finite.
    ValueError
        If ``n_top_genes`` is less than 2.

    Notes
    -----
    Against the mean of perturbations: Vinas Torne et al., *Systema*, Nature Biotechnology (2025).
    The 20 strongest genes: Lotfollahi et al., Nature Methods 16, 715 (2019). Weights: Mejia et
    al., *Diversity by Design* (arXiv 2506.22641).

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=500)
    >>> effect = scvi_sams.evaluation.observed_effects(adata, "perturbation", "control")
    >>> scvi_sams.evaluation.effect_agreement(effect, effect).columns.tolist()
    ['pearson', 'r2', 'relative_squared_error', 'pearson_top', 'r2_top', 'n_cells']
    """
    if n_top_genes < 2:
        raise ValueError(f"n_top_genes={n_top_genes}: a correlation needs at least 2 genes.")
    predicted_frame, observed_frame = aligned_profiles(predicted, observed)
    subtracted: NDArray[np.float64] | float = 0.0
    if reference is not None:
        subtracted = row_of_genes(reference, predicted_frame.columns, "reference")
    rows = [relative_to(frame, subtracted) for frame in (predicted_frame, observed_frame)]
    rows.append(observed_frame.to_numpy())
    if ranking is not None:
        rows[2] = aligned_profiles(predicted, ranking, "ranking")[1].to_numpy()
    if weights is not None:
        _, weight_frame = aligned_profiles(predicted, weights, "weights")
        rows.append(weight_frame.to_numpy())
        if (bad := ~(np.isfinite(rows[3]) & (rows[3] >= 0)).all(axis=1)).any():
            raise ScreenError(
                f"`weights` of {weight_frame.index[bad.argmax()]!r} must be finite and 0 or more."
            )
    index = predicted_frame.index.copy()
    if pooled:
        rows, index = [values.reshape(1, -1) for values in rows], pd.Index(["all"])
    values, truth, order = rows[:3]
    top = np.argsort(-np.abs(order), axis=1, kind="stable")[:, :n_top_genes]
    top_values, top_truth = (np.take_along_axis(each, top, axis=1) for each in (values, truth))
    columns = {
        "pearson": row_correlation(values, truth),
        "r2": _weighted_r2(values, truth),
        "relative_squared_error": ratio(
            ((values - truth) ** 2).sum(axis=1), (truth**2).sum(axis=1)
        ),
        "pearson_top": row_correlation(top_values, top_truth),
        "r2_top": _weighted_r2(top_values, top_truth),
    }
    if weights is not None:
        error = np.sum(rows[3] * (values - truth) ** 2, axis=1)
        columns["weighted_mse"] = ratio(error, rows[3].sum(axis=1))
        columns["weighted_r2"] = _weighted_r2(values, truth, rows[3])
    table = pd.DataFrame(columns, index=index)
    if isinstance(observed, ad.AnnData) and "n_cells" in observed.obs and not pooled:
        table["n_cells"] = observed.obs["n_cells"].loc[table.index]
    return table


def _weighted_r2(
    values: NDArray[np.float64],
    truth: NDArray[np.float64],
    weight: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """Coefficient of determination of each row."""
    weight = np.ones_like(truth) if weight is None else weight
    centre = ratio(np.sum(weight * truth, axis=1), weight.sum(axis=1))[:, None]
    variation = np.sum(weight * (truth - centre) ** 2, axis=1)
    # The mean of equal numbers is off by rounding, which is no variation.
    variation[variation <= 1e-24 * np.sum(weight * truth**2, axis=1)] = 0
    return 1 - ratio(np.sum(weight * (values - truth) ** 2, axis=1), variation)


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
        Conditions x genes, observed effects: every condition of ``predicted``, and those it may be
        confused with.
    metric
        Distance: ``"l1"`` and ``"l2"`` reward amplitude, ``"cosine"`` sees directions alone.
    exclude_target_genes
        Leave out the genes a condition is named after: a knocked-out target tells on itself.
    combination_delimiter
        What joins the parts of a condition; None takes every name as one part.

    Returns
    -------
    pandas.Series
        Score of each condition of ``predicted``; NaN where a prediction is not finite. By
        ``"cosine"``, no effect at all is as far from everything.

    Raises
    ------
    ScreenError
        If a condition or gene of ``predicted`` is not in ``observed``, or a value of ``observed``
        is not finite.
    ValueError
        If ``metric`` is unknown.

    Notes
    -----
    The score of the Virtual Cell Challenge (Roohani et al., Cell 2025) as cell-eval computes it
    (``discrimination_score_l1``), but that ties share their rank, so that the order of conditions
    earns nothing, and that the targets of combinations are left out as well.

    Examples
    --------
    >>> import pandas as pd
    >>> from scvi_sams.evaluation import perturbation_discrimination
    >>> effects = pd.DataFrame({"GATA1": [1.0, 3.0], "SPI1": [0.0, -1.0]}, index=["A", "B"])
    >>> perturbation_discrimination(0.8 * effects, effects).to_dict()
    {'A': 1.0, 'B': 1.0}
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
        if not np.isfinite(prediction).all():
            continue
        candidates = matrix
        if exclude_target_genes:
            targets = genes.isin(split_label(str(condition), combination_delimiter))
            if targets.any():
                prediction, candidates = prediction[:, ~targets], matrix[:, ~targets]
        # An angle with no effect at all is not defined: as far as what is unrelated.
        distance = np.nan_to_num(cdist(prediction, candidates, _DISTANCES[metric])[0], nan=1.0)
        closer = (distance < distance[own]).sum() + ((distance == distance[own]).sum() - 1) / 2
        scores[row] = 1 - closer / len(truth)
    return pd.Series(scores, index=values.index.copy(), name="perturbation_discrimination")


class CollapseIndex(NamedTuple):
    """Variance of predictions against the observed; see :func:`collapse_index`."""

    ratio: float
    """Predicted variance over the observed one, noise and all."""
    noise_corrected_ratio: float
    """Predicted variance over the observed one less its sampling variance."""
    predicted_variance: float
    """Sum over genes, in squared units of the tables, as those below."""
    observed_variance: float
    sampling_variance: float
    """What the observed variance owes to the limited number of cells; NaN without errors."""


def collapse_index(
    predicted: ProfileTable,
    observed: ProfileTable,
    standard_error: ProfileTable | str | None = "standard_error",
) -> CollapseIndex:
    r"""Variance of predictions across conditions, as a share of the observed variance.

    .. math::

        \mathrm{ratio} = \frac{\sum_g \mathrm{Var}_c(\hat x_{cg})}{\sum_g \mathrm{Var}_c(x_{cg})},
        \qquad
        \mathrm{noise\ corrected} = \frac{\sum_g \mathrm{Var}_c(\hat x_{cg})}
            {\sum_g \mathrm{Var}_c(x_{cg}) - \sum_g \frac1C \sum_c \sigma_{cg}^2}

    with :math:`\mathrm{Var}_c` the variance over the :math:`C` conditions and :math:`\sigma_{cg}`
    the standard error of the mean of the cells of a condition. 0 is a prediction that is the same
    for all perturbations (collapse), 1 one that is as diverse as the truth, right or not.

    Parameters
    ----------
    predicted, observed
        Conditions x genes, effects or mean expression; ``observed`` has every condition and gene
        of ``predicted``.
    standard_error
        Standard errors of the observed values: a layer of ``observed``, or a table. The part of
        the controls, in ``observed.var["control_standard_error"]``, is taken out, as all
        conditions share it. None does not correct.

    Returns
    -------
    CollapseIndex
        ``ratio`` and ``noise_corrected_ratio`` (NaN if a denominator is not positive), and the
        variances they are made of.

    Raises
    ------
    ScreenError
        If tables do not match, there are fewer than two conditions, or standard errors are
        missing.

    Notes
    -----
    The measure is ours, after the collapse to the mean that Mejia et al. (arXiv 2506.22641) and Wu
    et al., *PerturBench* (arXiv 2408.10609) describe.

    Examples
    --------
    >>> import pandas as pd
    >>> from scvi_sams.evaluation import collapse_index
    >>> effects = pd.DataFrame({"GATA1": [1.0, 3.0], "SPI1": [0.0, -1.0]}, index=["A", "B"])
    >>> collapse_index(0.5 * effects, effects, standard_error=None).ratio
    0.25
    """
    values, truth = aligned_profiles(predicted, observed)
    if len(values) < 2:
        raise ScreenError(f"`predicted` has {len(values)} conditions: a variance takes 2.")
    predicted_variance = float(np.var(values.to_numpy(), axis=0, ddof=1).sum())
    observed_variance = float(np.var(truth.to_numpy(), axis=0, ddof=1).sum())
    sampling_variance = float("nan")
    if standard_error is not None:
        errors, control = standard_error_frames(observed, standard_error, truth)
        own = np.maximum(errors.to_numpy() ** 2 - control**2, 0)
        sampling_variance = float(own.mean(axis=0).sum())
    variances = observed_variance, observed_variance - sampling_variance
    ratios = [predicted_variance / each if each > 0 else float("nan") for each in variances]
    return CollapseIndex(
        ratios[0], ratios[1], predicted_variance, observed_variance, sampling_variance
    )


def interval_coverage(
    predicted: ad.AnnData,
    observed: ProfileTable,
    level: float | None = None,
    standard_error: ProfileTable | str | None = "standard_error",
) -> pd.Series:
    r"""Share of the observed values of a condition that lie in its predicted intervals.

    With :math:`[a_{cg}, b_{cg}]` the central interval of level :math:`\alpha`,

    .. math::

        \mathrm{coverage}_c(\alpha) = \frac1G \sum_g \mathbf 1[a_{cg} \le x_{cg} \le b_{cg}],

    which is :math:`\alpha` on average if the intervals are right. For the standard error
    :math:`\sigma_{cg}` of the observed mean, half the width :math:`h` of an interval becomes
    :math:`\sqrt{h^2 + z_\alpha^2 \sigma_{cg}^2}`, with :math:`z_\alpha` the Normal quantile.

    Parameters
    ----------
    predicted
        Conditions x genes, with ``layers["lower"]`` and ``layers["upper"]``, as from
        ``model.get_average_treatment_effect``.
    observed
        Conditions x genes, with every condition and gene of ``predicted``.
    level
        Level of the intervals, by default that in ``uns["scvi_sams"]["credible_level"]``.
    standard_error
        Standard errors of the observed values: a layer of ``observed``, or a table. None takes the
        observed values for expectations, which understates coverage.

    Returns
    -------
    pandas.Series
        Share of each condition of ``predicted``; NaN for one without intervals.

    Raises
    ------
    ScreenError
        If tables do not match, or one lacks its intervals, their level, or standard errors.
    ValueError
        If the level is not between 0 and 1.

    Examples
    --------
    >>> import anndata
    >>> import numpy as np
    >>> import pandas as pd
    >>> from scvi_sams.evaluation import interval_coverage
    >>> truth = pd.DataFrame(np.random.default_rng(0).normal(size=(1, 2000)), index=["A"])
    >>> predicted = anndata.AnnData(0 * (truth := truth.add_prefix("gene_")))
    >>> predicted.layers["lower"], predicted.layers["upper"] = -1.28 + 0 * truth, 1.28 + 0 * truth
    >>> interval_coverage(predicted, truth, level=0.8, standard_error=None).round(2).to_dict()
    {'A': 0.8}
    """
    if level is None:
        uns = predicted.uns if isinstance(predicted, ad.AnnData) else {}
        if "credible_level" not in uns.get("scvi_sams", {}):
            raise ScreenError(
                "`predicted` does not say what the level of its intervals is: pass it as `level`."
            )
        level = float(uns["scvi_sams"]["credible_level"])
    if not 0 < level < 1:
        raise ValueError(f"The level {level!r} must be between 0 and 1.")
    _, truth = aligned_profiles(predicted, observed)
    lower, upper = (
        profile_frame(predicted, "predicted", layer=end).to_numpy() for end in ("lower", "upper")
    )
    noise = np.zeros(truth.shape)
    if standard_error is not None:
        errors, _ = standard_error_frames(observed, standard_error, truth)
        noise = norm.ppf((1 + level) / 2) * errors.to_numpy()
    # Moved outwards, as rounding of the middle would lose the ends of an interval.
    widening = np.hypot((upper - lower) / 2, noise) - (upper - lower) / 2
    inside = (lower - widening <= truth) & (truth <= upper + widening)
    share = np.where(np.isfinite(lower + upper).all(axis=1), inside.mean(axis=1), np.nan)
    return pd.Series(share, index=truth.index.copy(), name="coverage")


def interaction_residuals(
    effects: ProfileTable,
    combinations: Sequence[str] | None = None,
    combination_delimiter: str = "+",
) -> ad.AnnData:
    r"""Genetic interactions: effect of combinations less the sum of the effects of their parts.

    .. math:: \varepsilon_{AB} = \Delta_{AB} - \Delta_A - \Delta_B

    and likewise for more parts (Norman et al., Science 2019; Ahlmann-Eltze, Huber and Anders,
    Nature Methods 2025). Additive latents predict them only through the curvature of the decoder.

    Parameters
    ----------
    effects
        Conditions x genes, effects against the controls, with the parts of each combination.
    combinations
        Combinations wanted; by default all whose parts are in ``effects`` too.
    combination_delimiter
        What joins the parts of a combination.

    Returns
    -------
    anndata.AnnData
        Combinations x genes, residuals in ``X``. Of :func:`observed_effects`,
        ``layers["standard_error"]`` holds :math:`\sqrt{\sigma_{AB}^2 + \sigma_A^2 + \sigma_B^2 +
        \sigma_0^2}`, with :math:`\sigma` those of the means of cells: the controls enter once.

    Raises
    ------
    ScreenError
        If no combination is in ``effects`` with all its parts, or one asked for is not.

    Examples
    --------
    >>> import pandas as pd
    >>> from scvi_sams.evaluation import interaction_residuals
    >>> effects = pd.DataFrame({"GATA1": [1.0, 2.0, 3.5]}, index=["A", "B", "A+B"])
    >>> interaction_residuals(effects).to_df().loc["A+B", "GATA1"].item()
    0.5
    """
    frame = profile_frame(effects, "effects")
    wanted = list(combinations or ())
    if combinations is None:
        wanted = measured_combinations(frame.index, frame.index, combination_delimiter)
        if not wanted:
            raise ScreenError(
                f"No condition of `effects` joins parts by {combination_delimiter!r} that are all "
                "among its conditions: add the single perturbations."
            )
    # 1 for each combination and -1 for each of its parts; sparse, so that what is not predicted
    # of other conditions, NaN, is not touched.
    contrasts = sp.lil_matrix((len(wanted), len(frame)))
    for row, name in enumerate(wanted):
        parts = split_label(str(name), combination_delimiter)
        if len(parts) < 2:
            raise ScreenError(f"{name!r} is no combination joined by {combination_delimiter!r}.")
        if lacking := [part for part in [name, *parts] if part not in frame.index]:
            raise ScreenError(f"{name!r} needs {lacking[0]!r}, which is not in `effects`.")
        contrasts[row, frame.index.get_loc(name)] = 1.0
        for part in parts:
            contrasts[row, frame.index.get_loc(part)] -= 1.0
    contrasts, values = contrasts.tocsr(), frame.to_numpy()
    residuals = contrasts @ values
    # Sums of effects in single precision: a residual below this share of them is rounding.
    residuals[np.abs(residuals) <= 1e-6 * (abs(contrasts) @ np.abs(values))] = 0
    layers = {}
    if isinstance(effects, ad.AnnData) and "standard_error" in effects.layers:
        squared = profile_frame(effects, "effects", layer="standard_error").to_numpy() ** 2
        control = np.zeros(frame.shape[1])
        if "control_standard_error" in effects.var:
            control = effects.var["control_standard_error"].to_numpy(dtype=np.float64) ** 2
        shared = np.asarray(contrasts.sum(axis=1)) ** 2 * control
        own = np.maximum(squared - control, 0)
        layers["standard_error"] = np.sqrt(contrasts.power(2) @ own + shared)
    return ad.AnnData(
        residuals,
        obs=pd.DataFrame(index=pd.Index(wanted)),
        var=pd.DataFrame(index=frame.columns.copy()),
        layers=layers,
    )


def measured_combinations(
    conditions: Sequence[str] | pd.Index,
    measured: Collection[str] | pd.Index,
    delimiter: str | None,
) -> list[str]:
    """Combinations among conditions whose parts are all measured alone."""
    known = set(measured)
    of_each = parts_of(conditions, delimiter).items()
    return [name for name, parts in of_each if known.issuperset(parts)]


def parts_of(conditions: Sequence[str] | pd.Index, delimiter: str | None) -> dict[str, list[str]]:
    """Parts of each combination among conditions."""
    parts = {str(condition): split_label(str(condition), delimiter) for condition in conditions}
    return {condition: of_it for condition, of_it in parts.items() if len(of_it) > 1}


# -- the measures of a scorecard -----------------------------------------------------------------


class Measure(NamedTuple):
    """What a column of a scorecard says, and which way is up."""

    title: str
    better: Literal["higher", "lower", "target"]
    description: str
    target: float = float("nan")


def _coverage(level: int) -> Measure:
    what = f"share of the detected genes whose observed effect is in the {level}% interval"
    return Measure(f"coverage {level}%", "target", what, level / 100)


MEASURES: Mapping[str, Measure] = MappingProxyType(
    {
        "pearson": Measure(
            "delta r",
            "higher",
            "correlation of effects against the controls, over genes; 0 if none is predicted",
        ),
        "pearson_top": Measure(
            "delta r (top)", "higher", "the same over the genes that respond most"
        ),
        "pearson_perturbed": Measure(
            "r vs mean", "higher", "correlation of effects relative to the perturbed mean"
        ),
        "pearson_perturbed_top": Measure(
            "r vs mean (top)", "higher", "the same over the genes that respond most"
        ),
        "relative_squared_error": Measure(
            "rel. error", "lower", "squared error over squared effect; 1 for no change"
        ),
        "weighted_mse": Measure(
            "WMSE", "lower", "squared error, weighted by differential expression in other cells"
        ),
        "weighted_r2": Measure(
            "weighted R2", "higher", "weighted R squared of effects relative to the perturbed mean"
        ),
        "perturbation_discrimination": Measure(
            "PDS", "higher", "rank of the right condition among all by L1 distance; 0.5 by chance"
        ),
        "perturbation_discrimination_cosine": Measure(
            "PDS (cosine)",
            "higher",
            "the same by the angle between effects, which amplitude does not change",
        ),
        "interaction_correlation": Measure(
            "interaction r",
            "higher",
            "correlation of combinations less the sum of their parts; 0 for the sum itself",
        ),
        "e_distance": Measure(
            "E-distance", "lower", "energy distance between predicted and held-out cells"
        ),
        "collapse_index": Measure(
            "collapse index",
            "target",
            "variance between predicted conditions over that between true ones",
            1.0,
        ),
        **{f"coverage_{level}": _coverage(level) for level in (50, 80, 95)},
    }
)
"""Every measure, in the order of the columns."""


class EffectTables(NamedTuple):
    """Effects (conditions x genes) as the measures need them: observed, or predicted.

    The tables of a prediction are all the same. Observed ones differ in the control cells that
    they are against, since noise of controls that is in both sides would look like agreement.
    """

    effects: ad.AnnData
    """Against controls that predictions have not used, where there are such."""
    centred: ad.AnnData
    """Against the training controls, which cancel where effects are compared with each other."""
    with_parts: ad.AnnData | None = None
    """Combinations with the perturbations they are made of; None without combinations."""
    halves: tuple[ad.AnnData, ad.AnnData] | None = None
    """As ``centred``, in each half of the cells."""


class Yardstick(NamedTuple):
    """What predictions are held against."""

    observed: EffectTables
    reference: pd.Series
    """Mean effect of the training conditions."""
    weights: tuple[pd.DataFrame, pd.DataFrame] | None
    """Weights of genes from each half of the held-out cells."""
    combination_delimiter: str | None
    n_top_genes: int


def score_tables(predicted: EffectTables, yardstick: Yardstick) -> pd.DataFrame:
    """Score the effects of every observed condition, conditions x measures."""
    observed, reference = yardstick.observed, yardstick.reference
    conditions = observed.effects.obs_names
    delimiter, n_top = yardstick.combination_delimiter, yardstick.n_top_genes
    effects, centred = predicted.effects[conditions], predicted.centred[conditions]
    against_controls = effect_agreement(effects, observed.effects, n_top_genes=n_top)
    against_mean = effect_agreement(
        centred, observed.centred, reference, n_top_genes=n_top, ranking=observed.effects
    )
    scores = against_controls[["pearson", "pearson_top"]].copy()
    scores[["pearson_perturbed", "pearson_perturbed_top"]] = against_mean[
        ["pearson", "pearson_top"]
    ]
    scores["relative_squared_error"] = against_controls["relative_squared_error"]
    # The controls do not cancel in an angle: those that predictions have not used.
    pair, angle = (centred, observed.centred), (effects, observed.effects)
    scores["perturbation_discrimination"] = perturbation_discrimination(
        *pair, combination_delimiter=delimiter
    )
    scores["perturbation_discrimination_cosine"] = perturbation_discrimination(
        *angle, "cosine", combination_delimiter=delimiter
    )
    _count_flat_as_unrelated(scores, centred, observed.centred)
    if len(conditions) == 1:  # nothing to mistake it for
        scores[["perturbation_discrimination", "perturbation_discrimination_cosine"]] = np.nan
    if yardstick.weights is not None and predicted.halves and observed.halves:
        # Weights of one half, errors in the other, and the other way round.
        first, second = (
            effect_agreement(
                predicted.halves[scored][conditions],
                observed.halves[scored],
                reference,
                yardstick.weights[1 - scored],
            )[["weighted_mse", "weighted_r2"]]
            for scored in (0, 1)
        )
        scores[first.columns] = (first + second) / 2
    if observed.with_parts is not None and predicted.with_parts is not None:
        scores["interaction_correlation"] = interaction_correlation(
            predicted.with_parts, observed.with_parts, delimiter
        )
    return scores


def _count_flat_as_unrelated(
    scores: pd.DataFrame, predicted: ad.AnnData, observed: ad.AnnData
) -> None:
    """Give a prediction without variation a correlation of 0, so that no mean leaves it out."""
    finite = np.isfinite(dense(predicted.X)).all(axis=1) & (np.ptp(dense(observed.X), axis=1) > 0)
    columns = [name for name in scores if name.startswith("pearson")]
    flat = scores[columns].isna() & finite[:, None]
    scores[columns] = scores[columns].mask(flat, 0.0)


def coverage_of(predicted: ad.AnnData, observed: ad.AnnData) -> pd.DataFrame | None:
    """Coverage of the intervals of predicted effects; None for a prediction without intervals.

    Intervals are Normal, of the mean and ``layers["std"]``. Genes without a count have no known
    error, and are left out.
    """
    if "std" not in predicted.layers:
        return None
    predicted = predicted[observed.obs_names]
    error, spread = dense(observed.layers["standard_error"]), dense(predicted.layers["std"])
    distance = np.abs(dense(observed.X) - dense(predicted.X))
    known = error > 0
    scores = pd.DataFrame(index=observed.obs_names)
    for level in (50, 80, 95):
        inside = distance <= norm.ppf(0.5 + level / 200) * np.hypot(spread, error)
        share = ratio((inside & known).sum(axis=1) * 1.0, known.sum(axis=1) * 1.0)
        # NaN where there is no posterior at all.
        scores[f"coverage_{level}"] = np.where(np.isnan(spread).any(axis=1), np.nan, share)
    return scores


def collapse_of(
    predicted: ad.AnnData, observed: ad.AnnData, drawn: NDArray[np.float64]
) -> tuple[float, NDArray[np.float64]]:
    """Noise-corrected collapse index over all conditions, and of draws of conditions.

    ``drawn`` says how often each condition is drawn, draws x conditions.
    """
    index = collapse_index(predicted[observed.obs_names], observed)
    n_conditions = observed.n_obs

    def variances(table: ad.AnnData) -> NDArray[np.float64]:
        # From the products of all pairs, so that a draw costs no pass over the genes.
        values = dense(table[observed.obs_names].X)
        products = values @ values.T
        within = drawn @ np.diag(products)
        between = np.einsum("dc,ck,dk->d", drawn, products, drawn, optimize=True)
        return (within - between / n_conditions) / (n_conditions - 1)

    # A drawn set repeats conditions, which takes 1 / n off every variance, noise included.
    noise = index.sampling_variance * (1 - 1 / n_conditions)
    return index.noise_corrected_ratio, ratio(variances(predicted), variances(observed) - noise)


def interaction_correlation(
    predicted: ad.AnnData, observed: ad.AnnData, delimiter: str | None
) -> pd.Series:
    """Correlation over genes of each combination that both sides have, with its parts."""
    assert delimiter is not None  # without it there are no combinations
    known = set(predicted.obs_names).intersection(observed.obs_names)
    combinations = measured_combinations(
        [name for name in observed.obs_names if name in known], known, delimiter
    )
    if not combinations:
        return pd.Series(dtype=float)
    left, right = (
        interaction_residuals(table, combinations, delimiter) for table in (predicted, observed)
    )
    correlation = effect_agreement(left, right)[["pearson"]].copy()
    _count_flat_as_unrelated(correlation, left, right)
    return correlation["pearson"]
