"""Mechanisms and active perturbations, called with error control."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scvi_sams._arguments import checked
from scvi_sams._exceptions import ScreenError, unknown_perturbations
from scvi_sams.model.donors import effects_across_donors
from scvi_sams.model.read_outs import inclusion_and_slab, perturbation_table
from scvi_sams.tl._control_null import null_perturbations
from scvi_sams.tl.error_rates import (
    bayesian_q_value,
    calibrated_q_value,
    effect_interval,
    local_false_sign_rate,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scvi_sams.model import SAMSVAE


def mechanisms(
    model: SAMSVAE,
    fdr: float = 0.05,
    null: Sequence[str] | None = None,
    *,
    null_tables: Sequence[pd.DataFrame] = (),
    donor_key: str | None = None,
    credible_level: float = 0.95,
    include_null: bool = False,
) -> pd.DataFrame:
    r"""Which perturbation moves which latent, at a chosen false discovery rate.

    The recommended path is with null perturbations in the fit: relabel some control cells by
    :func:`add_control_null`, set up and train on the new labels. A call must then pass two
    estimates of the share of false calls. That of the posterior is the mean of
    :math:`1 - q_{tl}` over the entries called (Newton et al., Biostatistics 5, 155, 2004). That
    of the null is, for a threshold that :math:`R` of :math:`T` perturbations and :math:`D` of
    :math:`n` null ones reach, :math:`(1 + D) / (n + 1) \cdot T / R`: the Benjamini-Hochberg
    procedure on conformal p-values (Bates et al., Annals of Statistics 51, 149, 2023), taken
    over perturbations and over entries, whichever is larger. Without a null the first is all.

    A latent can be wrong as a whole: split in two, or standing for two. The posterior of a fit
    does not know that, and the null, which does nothing, hardly takes part in it: with weak
    effects, calls are false about twice as often as they claim, all of them on perturbations
    that do something (``python -m benchmarks mechanism_fdr``). Ask of a call that a fit with
    another seed makes it too (:func:`mechanism_stability`). The weaker claim of
    :func:`active_perturbations` holds without.

    Parameters
    ----------
    model
        A trained model with masks.
    fdr
        False discovery rate of the calls.
    null
        Perturbations of this fit that are known to do nothing. By default those of
        :func:`add_control_null` and :func:`add_permuted_null`; ``()`` for none, that is for
        Bayesian calls.
    null_tables
        Tables of other fits to the same screen with other draws of null perturbations, made with
        ``include_null=True``, whose null is added: many null perturbations from few control cells.
    donor_key
        Column of ``model.adata.obs``, a donor or replicate each. An effect is then called, and
        its interval is, against the spread between donors and not that between cells alone: that
        of an average donor. Donor k shows :math:`s_{tl} + b_{tlk}`, :math:`b_{tlk} \sim
        \mathrm{Normal}(0, \tau_{tl}^2)`; :math:`\tau_{tl}` is summed out on a grid whose prior
        is learned over the screen, from what the cells of each donor say in the fitted networks.
        Give it as ``batch_key`` of the fit too.
    credible_level
        Level of the intervals.
    include_null
        Keep the null perturbations in the table (never called, ``is_null`` true).

    Returns
    -------
    pandas.DataFrame
        A row for each perturbation and latent:

        * ``perturbation``, ``latent``
        * ``inclusion_probability``, ``log_odds``: that the mask is one
        * ``effect_mean``, ``effect_std``, ``effect_lower``, ``effect_upper``: of mask times
          embedding, in standard deviations of the basal state; an end of the interval is exactly
          zero where the mask may be
        * ``lfsr``: local false sign rate, the probability that the effect is zero or of the other
          sign (Stephens, Biostatistics 18, 275, 2017)
        * ``bayesian_q_value``: posterior expected share of false calls
        * ``null_q_value``: that estimated from the null, NaN without
        * ``q_value``: the larger of the two, by which calls are made
        * ``donor_sd``, with ``donor_key``: expected :math:`\tau_{tl}`
        * ``is_null``, ``called``

        ``attrs`` holds ``fdr`` and ``n_null``, the number of null perturbations.

    Raises
    ------
    NotImplementedError
        If the model has no masks.
    UnknownPerturbationError
        If ``null`` names a perturbation that the model has not seen.
    ScreenError
        If a table of ``null_tables`` has no null perturbation or other latents, or
        ``donor_key`` is no column of two donors or more without gaps.
    ValueError
        If ``fdr`` or ``credible_level`` is not between 0 and 1.

    Warns
    -----
    UserWarning
        If there are so few null perturbations that nothing could be called at this rate.

    Examples
    --------
    >>> scvi_sams.tl.add_control_null(adata, "perturbation", "control")  # doctest: +SKIP
    >>> SAMSVAE.setup_anndata(
    ...     adata, perturbation_key="perturbation_with_null", control="control"
    ... )  # doctest: +SKIP
    >>> model = SAMSVAE(adata)  # doctest: +SKIP
    >>> model.train()  # doctest: +SKIP
    >>> scvi_sams.tl.mechanisms(model, fdr=0.1).query("called")  # doctest: +SKIP
    """
    fdr, include_null = checked("fdr", fdr), checked("include_null", include_null)
    across = None if donor_key is None else effects_across_donors(model, donor_key)
    probability, log_odds, slab_mean, slab_std = inclusion_and_slab(model, "mechanisms", across)
    null = _null_names(model.perturbation_names, null)
    is_null = probability.index.isin(null)
    lower, upper = effect_interval(probability, slab_mean, slab_std, credible_level)
    mean = probability * slab_mean
    second_moment = probability * (slab_std**2 + slab_mean**2)
    further = _null_log_odds(null_tables)
    bayesian, calibrated, n_null = _q_values(probability, log_odds, is_null, further, fdr)
    columns = {
        "inclusion_probability": probability,
        "log_odds": log_odds,
        "effect_mean": mean,
        "effect_std": np.sqrt((second_moment - mean**2).clip(lower=0)),
        "effect_lower": lower,
        "effect_upper": upper,
        "lfsr": local_false_sign_rate(probability, slab_mean, slab_std),
        "bayesian_q_value": bayesian,
        "null_q_value": calibrated,
        "q_value": np.fmax(bayesian, calibrated),
    }
    if across is not None:
        columns["donor_sd"] = perturbation_table(model, across.spread)
    n_latent = probability.shape[1]
    table = pd.DataFrame(
        {
            "perturbation": np.repeat(probability.index.to_numpy(object), n_latent),
            "latent": np.tile(probability.columns.to_numpy(object), len(probability)),
        }
        | {name: values.to_numpy(np.float64).ravel() for name, values in columns.items()}
    )
    table["is_null"] = np.repeat(is_null, n_latent)
    table["called"] = (table["q_value"] <= fdr) & ~table["is_null"]
    if not include_null:
        table = table[~table["is_null"]].reset_index(drop=True)
    table.attrs = {"fdr": fdr, "n_null": n_null}
    return table


def active_perturbations(
    model: SAMSVAE,
    fdr: float = 0.05,
    null: Sequence[str] | None = None,
    *,
    null_tables: Sequence[pd.DataFrame] = (),
    donor_key: str | None = None,
) -> pd.DataFrame:
    r"""Which perturbations move any latent at all, at a chosen false discovery rate.

    The weaker claim than :func:`mechanisms`: it holds whatever became of the latents. A
    perturbation is scored by the largest of its log-odds. The probability that it is active is
    :math:`1 - \prod_l (1 - q_l)`, as masks are independent in the posterior. With a null in the
    fit, calls are by the null alone: if perturbations that do nothing are exchangeable with it,
    the false discovery rate is controlled whatever the posterior is worth.

    Parameters
    ----------
    model, fdr, null, null_tables, donor_key
        As for :func:`mechanisms`.

    Returns
    -------
    pandas.DataFrame
        A row a perturbation: ``probability_active``, ``log_odds`` (the largest), ``latent`` (its
        latent), ``bayesian_q_value``, ``null_q_value``, ``q_value`` (that of the null where there
        is one) and ``called``; ``attrs`` as for :func:`mechanisms`.

    Raises
    ------
    NotImplementedError
        If the model has no masks.
    UnknownPerturbationError
        If ``null`` names a perturbation that the model has not seen.
    ScreenError
        If a table of ``null_tables`` has no null perturbation, or ``donor_key`` cannot be used.
    ValueError
        If ``fdr`` is not between 0 and 1.

    Examples
    --------
    >>> scvi_sams.tl.active_perturbations(model, fdr=0.1).query("called")  # doctest: +SKIP
    """
    fdr = checked("fdr", fdr)
    across = None if donor_key is None else effects_across_donors(model, donor_key)
    probability, log_odds, _, _ = inclusion_and_slab(model, "active_perturbations", across)
    is_null = probability.index.isin(_null_names(model.perturbation_names, null))
    further = _null_log_odds(null_tables)
    best = log_odds.max(axis=1).to_frame("any")
    active = (1 - np.prod(1 - probability, axis=1)).to_frame("any")
    best_of_null = None if further is None else further.max(axis=1).to_frame()
    bayesian, calibrated, n_null = _q_values(active, best, is_null, best_of_null, fdr)
    table = pd.DataFrame(
        {
            "probability_active": active["any"],
            "log_odds": best["any"],
            "latent": log_odds.idxmax(axis=1),
            "bayesian_q_value": bayesian["any"],
            "null_q_value": calibrated["any"],
            "q_value": (calibrated if n_null else bayesian)["any"],
        }
    )[~is_null]
    table["called"] = table["q_value"] <= fdr
    table.attrs = {"fdr": fdr, "n_null": n_null}
    return table


def _null_names(names: list[str], null: Sequence[str] | None) -> list[str]:
    """Names of the null perturbations, those of ``add_control_null`` by default."""
    if null is None:
        return null_perturbations(names)
    if not isinstance(null, str | Iterable):
        raise ScreenError(f"null={null!r} cannot be used: give names of perturbations.")
    null = [null] if isinstance(null, str) else list(map(str, null))
    if unknown := [name for name in null if name not in names]:
        raise unknown_perturbations(unknown, names)
    return null


def _q_values(
    probability: pd.DataFrame,
    score: pd.DataFrame,
    is_null: np.ndarray,
    further_null: pd.DataFrame | None,
    fdr: float,
) -> tuple[pd.DataFrame, pd.DataFrame, int]:
    """Bayesian and calibrated q-values, NaN of null rows, and the size of the null.

    Without a null all calibrated ones are NaN.
    """
    bayesian = bayesian_q_value(probability[~is_null]).reindex(probability.index)
    null_score = score[is_null]
    if further_null is not None:
        null_score = pd.DataFrame(np.concatenate([null_score, further_null]))
    n_null, n_real = len(null_score), int((~is_null).sum())
    if n_null == 0:
        return bayesian, score * np.nan, 0
    if (least := 1 / (n_null + 1)) > fdr:
        warnings.warn(
            f"With {n_null} null perturbations the estimated rate is {least:.2f} or more whatever "
            f"the {n_real} others do, so that nothing can be called at fdr={fdr}: make more by "
            "add_control_null, or add those of other fits as null_tables.",
            UserWarning,
            stacklevel=3,
        )
    calibrated = calibrated_q_value(score[~is_null], null_score).reindex(score.index)
    return bayesian, calibrated, n_null


def _null_log_odds(tables: Sequence[pd.DataFrame]) -> pd.DataFrame | None:
    """Log-odds of the null perturbations of tables, null perturbations x latents."""
    rows = []
    for number, table in enumerate(tables):
        null = table[table["is_null"]]
        if len(null) == 0:
            raise ScreenError(
                f"Table {number} of null_tables has no null perturbations: make it by "
                "scvi_sams.tl.mechanisms(model, include_null=True) from a fit that has some."
            )
        rows.append(null.pivot(index="perturbation", columns="latent", values="log_odds"))
    return pd.concat(rows) if rows else None
