"""Effects of perturbations that no cell received."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd

from scvi_sams._exceptions import ScreenError, listed
from scvi_sams.data.tables import layer_names, profile_frame
from scvi_sams.model.read_outs import check_level
from scvi_sams.tl.effect_prior import EffectPrior, Noise, similarities, variance_ratios

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from scvi_sams.model import SAMSVAE
    from scvi_sams.tl.effect_prior import Similarity


_FEWEST = 10  # measured perturbations, of which an error of a mean can be known
_SHARES = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0)
_ERRORS = 2.0  # standard errors by which an embedding must beat the mean
_ERROR_LAYERS = ("standard_error", "std")


def predict_unseen(
    effects: SAMSVAE | ad.AnnData,
    embedding: pd.DataFrame,
    perturbations: Sequence[str] | None = None,
    *,
    credible_level: float = 0.95,
    seed: int | None = None,
) -> ad.AnnData:
    r"""Effects of perturbations without cells, from how they resemble measured ones.

    What resembles is said by a table of features, such as an embedding of genes. Effects of
    measured perturbations on gene :math:`g` have a normal prior,

    .. math::
        y_{pg} = \mu_g + f_{pg} + \epsilon_{pg}, \qquad
        f_{\cdot g} \sim \mathrm{Normal}(0, v_g (\lambda K + (1 - \lambda) I)),

    with the standard errors of the effects in :math:`\epsilon` and a kernel :math:`K` of the
    features. Kernel (scalar product, cosine, or a falling exponential of it) and share
    :math:`\lambda` are those of maximal marginal likelihood, the same for all genes, and variances
    :math:`v_g` have a prior that genes share. All of it is in closed form (ridge regression on
    features, with variances learned); nothing is trained.

    Whether the embedding is of use is asked of the measured perturbations. Each is predicted from
    all others, in closed form, with :math:`\lambda` and with :math:`\lambda = 0`, which is the
    mean of perturbations. Unless the mean squared error falls by more than two of its standard
    errors over perturbations, the embedding **is not supported**: the mean is returned, with the
    wide interval of one more perturbation, and ``obs["supported"]`` is False.

    Parameters
    ----------
    effects
        Effects of measured perturbations: from :func:`scvi_sams.evaluation.observed_effects`, or
        any AnnData, conditions x genes (or latents), with their errors in
        ``layers["standard_error"]`` or ``layers["std"]``; or a trained model, for
        :meth:`SAMSVAE.get_average_treatment_effect`. The observed are better: a model
        has shrunk its own, and intervals come out too narrow.
    embedding
        Perturbations x features, measured and not, in one unit: features of large variance count
        for more. A table of gene sets (1 for members, 0 for others), embeddings of genes or
        proteins (embpy writes such), or correlations of genes among control cells will do.
    perturbations
        Rows of the embedding to predict; all that were not measured by default.
    credible_level
        Level of the intervals.
    seed
        Seed of the draws behind the effects of a model.

    Returns
    -------
    anndata.AnnData
        Perturbations x genes, as :meth:`SAMSVAE.get_average_treatment_effect`: mean in ``X``,
        ``layers["std"]``, and ``lower`` and ``upper``, which are as many standard deviations from
        the mean as hold ``credible_level`` of the measured effects, each predicted from all
        others. In ``obs``: ``supported``, ``nearest`` (the measured perturbation with the largest
        cosine of centred features) and ``similarity`` (that cosine). ``uns["scvi_sams"]`` says
        ``supported``, ``kernel``, ``share`` (:math:`\lambda`), ``n_measured``, ``error`` and
        ``mean_error`` (mean squared errors of measured effects predicted with the embedding, and
        by the mean), ``improvement_error`` (standard error of their difference) and ``verdict``,
        the same in words.

    Raises
    ------
    ScreenError
        If fewer than ten measured perturbations are in the embedding, a perturbation that is asked
        for is not or was measured, a number is not finite, or the effects have no errors.

    See Also
    --------
    scvi_sams.evaluation.BASELINES : ``"perturbed mean"``, ``"bilinear ridge"`` and ``"control
        covariance"``, simple rules for perturbations without cells.

    Notes
    -----
    The variance of an error is taken as a product of one number for the perturbation and one for
    the gene. Kernel, share and prior variances are not learned anew for each perturbation left
    out. Effects are not normal where a perturbation does much or nothing; the width of intervals
    follows measured ones, but is the same for strong and weak.

    Examples
    --------
    >>> import anndata as ad, numpy as np, pandas as pd, scvi_sams
    >>> rng = np.random.default_rng(0)
    >>> features = pd.DataFrame(rng.normal(size=(40, 4)), index=[f"P{k}" for k in range(40)])
    >>> truth = features.to_numpy() @ rng.normal(size=(4, 60))
    >>> measured = ad.AnnData(truth[:30] + rng.normal(0, 0.3, (30, 60)))
    >>> measured.obs_names = features.index[:30]
    >>> measured.layers["standard_error"] = np.full((30, 60), 0.3)
    >>> found = scvi_sams.tl.predict_unseen(measured, features)
    >>> bool(found.obs["supported"].all()), found.shape
    (True, (10, 60))
    >>> bool(np.corrcoef(found.X.ravel(), truth[30:].ravel())[0, 1] > 0.9)
    True
    """
    check_level(credible_level)
    table = _table(embedding)
    effect, variance, provenance = _measured(effects, table.index, seed)
    asked = _asked(perturbations, table.index, effect.index)
    features = table.loc[[*effect.index, *asked]].to_numpy()
    if not np.ptp(features[: len(effect)], axis=0).any():
        raise ScreenError("`embedding` is the same for all measured perturbations.")
    noise = Noise.from_variances(variance)
    values = effect.to_numpy()
    ratios = variance_ratios(values, noise)
    kernels = list(similarities(features, len(effect)))
    mean_alone = EffectPrior(values, noise, kernels[0], 0.0, ratios)
    chosen = _best(mean_alone, kernels)
    left_out, of_mean = chosen.leave_one_out(), mean_alone.leave_one_out()
    error, mean_error = (((values - found.mean) ** 2).mean(1) for found in (left_out, of_mean))
    gain = float(np.mean(mean_error - error))
    gain_error = float(np.std(mean_error - error, ddof=1) / np.sqrt(len(effect)))
    supported = gain > _ERRORS * gain_error
    used = chosen if supported else mean_alone
    left_out = left_out if supported else of_mean
    moments = used.predict()
    spread = np.sqrt(left_out.variance + np.outer(noise.of_perturbation, noise.of_gene))
    width = np.quantile(np.abs(values - left_out.mean) / spread, credible_level)
    std = np.sqrt(moments.variance)
    layers = {
        "lower": moments.mean - width * std,
        "upper": moments.mean + width * std,
        "std": std,
    }
    cosine = kernels[1].to_measured
    predicted = ad.AnnData(
        moments.mean.astype(np.float32),
        obs=pd.DataFrame(
            {
                "supported": supported,
                "nearest": effect.index.to_numpy(object)[cosine.argmax(1)],
                "similarity": cosine.max(1),
            },
            index=pd.Index(asked, name="condition"),
        ),
        var=pd.DataFrame(index=effect.columns),
        layers={name: layer.astype(np.float32) for name, layer in layers.items()},
    )
    predicted.uns["scvi_sams"] = provenance | {
        "credible_level": credible_level,
        "supported": supported,
        "kernel": chosen.similarity.name if chosen.share else "none",
        "share": chosen.share,
        "n_measured": len(effect),
        "error": float(error.mean()),
        "mean_error": float(mean_error.mean()),
        "improvement_error": gain_error,
        "verdict": ("Supported" if supported else "Not supported, the mean is returned")
        + ": measured perturbations, each predicted from the others, have squared error "
        f"{error.mean():.4g} with the embedding and {mean_error.mean():.4g} by their mean "
        f"(difference known to {gain_error:.2g}).",
    }
    return predicted


def _best(mean_alone: EffectPrior, kernels: list[Similarity]) -> EffectPrior:
    """Kernel and share of the largest marginal likelihood, no share among them."""
    best = mean_alone
    for kernel in kernels:
        for share in _SHARES:
            candidate = EffectPrior(
                mean_alone.effect, mean_alone.noise, kernel, share, mean_alone.ratios
            )
            if candidate.log_evidence > best.log_evidence:
                best = candidate
    return best


def _table(embedding: pd.DataFrame) -> pd.DataFrame:
    """The embedding in double precision, checked."""
    if not isinstance(embedding, pd.DataFrame):
        raise ScreenError(
            f"`embedding` is of type {type(embedding).__name__}: give a DataFrame, perturbations "
            "x features (of an AnnData, to_df())."
        )
    table = embedding.set_axis(embedding.index.astype(str))
    if table.index.has_duplicates:
        twice = table.index[table.index.duplicated()][0]
        raise ScreenError(f"`embedding` has {twice!r} twice: keep one row.")
    table = table.astype(np.float64)
    faulty = ~np.isfinite(table.to_numpy()).all(1)
    if faulty.any():
        raise ScreenError(
            f"`embedding` of {table.index[faulty.argmax()]!r} is not finite: leave it out, or "
            "fill it in."
        )
    return table


def _measured(
    effects: SAMSVAE | ad.AnnData, known: pd.Index, seed: int | None
) -> tuple[pd.DataFrame, NDArray[np.float64], dict[str, object]]:
    """Measured effects of perturbations in the embedding, their variances, and their origin."""
    table = effects
    if not isinstance(effects, ad.AnnData):
        if not hasattr(effects, "get_average_treatment_effect"):
            raise ScreenError(
                f"`effects` is of type {type(effects).__name__}: give a model, or an AnnData with "
                "effects in X and their errors in layers['standard_error']."
            )
        named = [name for name in effects.perturbation_names if name in known]
        _check_number(named)
        table = effects.get_average_treatment_effect(named, seed=seed)
    layer = next((name for name in _ERROR_LAYERS if name in table.layers), None)
    if layer is None:
        raise ScreenError(
            "`effects` has no layer 'standard_error' or 'std', only "
            f"{', '.join(layer_names(table)) or 'X'}: how well effects are known is needed."
        )
    frame, error = profile_frame(table, "effects"), profile_frame(table, "effects", layer)
    named = [name for name in frame.index if name in known]
    _check_number(named)
    frame, error = frame.loc[named], error.loc[named]
    faulty = ~(np.isfinite(frame.to_numpy()) & (error.to_numpy() >= 0)).all(1)
    if faulty.any():
        raise ScreenError(
            f"`effects` of {named[int(faulty.argmax())]!r}, or their errors, are not finite (as "
            "of a perturbation with one cell): leave it out."
        )
    if not (error.to_numpy() > 0).any():
        raise ScreenError("`effects` have errors that are all zero.")
    origin = dict(table.uns.get("scvi_sams", {}))
    return frame, error.to_numpy() ** 2, origin


def _check_number(named: list[str]) -> None:
    if len(named) < _FEWEST:
        raise ScreenError(
            f"{len(named)} measured perturbations are in `embedding` ({listed(named)}): at least "
            f"{_FEWEST} are needed. Its index holds their names, as in `effects`."
        )


def _asked(perturbations: Sequence[str] | None, known: pd.Index, measured: pd.Index) -> list[str]:
    """Names to predict, checked."""
    if isinstance(perturbations, str):
        perturbations = [perturbations]
    if perturbations is None:
        asked = [name for name in known if name not in measured]
    else:
        asked = list(dict.fromkeys(map(str, perturbations)))
    if absent := [name for name in asked if name not in known]:
        raise ScreenError(f"`embedding` has no row of {listed(absent)}: add it.")
    if seen := [name for name in asked if name in measured]:
        raise ScreenError(f"{listed(seen)} were measured: see `effects`, and leave them out.")
    if not asked:
        raise ScreenError("All perturbations of `embedding` were measured: add rows of others.")
    return asked
