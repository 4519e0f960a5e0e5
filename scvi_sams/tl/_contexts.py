"""Where the effect of a perturbation is another in one context than in the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from scipy.stats import norm

from scvi_sams._arguments import checked
from scvi_sams.model.donors import effects_across_donors
from scvi_sams.model.read_outs import deviation_table, perturbation_table, require_effects
from scvi_sams.tl._mechanisms import _null_names, _q_values

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scvi_sams.model import SAMSVAE


def context_differences(
    model: SAMSVAE,
    fdr: float = 0.05,
    null: Sequence[str] | None = None,
    *,
    donor_key: str | None = None,
    credible_level: float = 0.95,
    include_null: bool = False,
) -> pd.DataFrame:
    r"""Which perturbation moves which latent differently in which context, with error control.

    The effect of a perturbation in context c is :math:`s_t + m_{tc} \delta_{tc}`, a part that all
    contexts share and a sparse deviation. Deviations are called as :func:`mechanisms` are: by the
    posterior expected share of false calls, and, with null perturbations in the fit
    (:func:`add_control_null`, whose cells are controls of every context), by theirs too.

    Of two contexts that differ, which of them deviates is not in the data: the shared part is then
    the smaller effect, and a call says that the two differ. Of three or more it is what most
    contexts have.

    Parameters
    ----------
    model
        A trained model set up with ``context_key``.
    fdr
        False discovery rate of the calls.
    null
        Perturbations of this fit that are known to do nothing, as for :func:`mechanisms`.
    donor_key
        Column of ``model.adata.obs``, a donor or replicate each. A difference is then called
        against the spread between donors, as by :func:`mechanisms`. Donors that are in several
        contexts are held against themselves: donor k shows the difference :math:`m_{tc}
        \delta_{tc} + b_{tck}` from its own effect in the other contexts. If each is in one
        context, it shows the same of the effect that contexts share, and what the other
        donors add to the variance of that is part of the variance of the difference.
    credible_level
        Level at which signs must be sure for ``sign_change``.
    include_null
        Keep the null perturbations in the table (never called, ``is_null`` true).

    Returns
    -------
    pandas.DataFrame
        A row for each perturbation, context and latent:

        * ``perturbation``, ``context``, ``latent``
        * ``measured``: whether any training cell has both; otherwise the row is the prior
        * ``shared_effect``, ``difference``, ``sd``: means of mask times embedding, of the shared
          part and of the deviation, and the standard deviation of the latter, in standard
          deviations of the basal state; the effect in the context is the sum of the first two
        * ``probability``, ``log_odds``: that the deviation is not zero
        * ``bayesian_q_value``, ``null_q_value`` (NaN without a null) and ``q_value``, the larger
        * ``sign_change``: called, and the effect in the context has surely another sign than the
          shared one
        * ``donor_sd``, with ``donor_key``: expected standard deviation of the effect between
          donors
        * ``is_null``, ``called``

        ``attrs`` holds ``fdr`` and ``n_null``, the number of null perturbations.

    Raises
    ------
    NotImplementedError
        If the model has no effects by context.
    UnknownPerturbationError
        If ``null`` names a perturbation that the model has not seen.
    ScreenError
        If ``fdr`` or ``credible_level`` is not between 0 and 1, or ``donor_key`` is no column of
        two donors or more without gaps.

    Warns
    -----
    UserWarning
        If there are so few null perturbations that nothing could be called at this rate.

    Examples
    --------
    >>> SAMSVAE.setup_anndata(
    ...     adata, perturbation_key="guide", control="NT", context_key="cell_type"
    ... )  # doctest: +SKIP
    >>> model = SAMSVAE(adata)  # doctest: +SKIP
    >>> model.train()  # doctest: +SKIP
    >>> scvi_sams.tl.context_differences(model, fdr=0.1).query("called")  # doctest: +SKIP
    """
    fdr, credible_level = checked("fdr", fdr), checked("credible_level", credible_level)
    include_null = checked("include_null", include_null)
    effects = require_effects(model, "context_differences", contexts=True)
    across = None if donor_key is None else effects_across_donors(model, donor_key)
    raw_log_odds = effects.mask_log_odds().double() if across is None else across.log_odds
    mean, variance = effects.slab_moments() if across is None else across[1:3]
    on = torch.sigmoid(raw_log_odds)
    log_odds = deviation_table(model, raw_log_odds)
    probability = deviation_table(model, on)
    difference = deviation_table(model, on * mean)
    second = deviation_table(model, on * (variance + mean.square()))
    shared = perturbation_table(model, on * mean)
    is_null = log_odds.index.isin(null_names := _null_names(model.perturbation_names, null))
    bayesian, calibrated, n_null = _q_values(probability, log_odds, is_null, None, fdr)
    q_value = np.fmax(bayesian, calibrated)
    called = (q_value <= fdr) & ~log_odds.index.isin(null_names)[:, None]

    contexts = log_odds.columns.get_level_values("context")
    shared = shared[log_odds.columns.get_level_values("latent")].set_axis(log_odds.columns, axis=1)
    statistics = model.module.closed_form.statistics
    n_seen = statistics.n_occurrences[-effects.n_deviations :].expand(-1, mean.shape[1])
    columns = {
        "measured": deviation_table(model, n_seen) > 0,
        "shared_effect": shared,
        "difference": difference,
        "sd": np.sqrt((second - difference**2).clip(lower=0)),
        "probability": probability,
        "log_odds": log_odds,
        "bayesian_q_value": bayesian,
        "null_q_value": calibrated,
        "q_value": q_value,
        "sign_change": called & _signs_differ(model, mean, variance, credible_level),
    }
    if across is not None:
        columns["donor_sd"] = deviation_table(model, across.spread)
    n_entries = len(contexts)
    table = pd.DataFrame(
        {
            "perturbation": np.repeat(log_odds.index.to_numpy(object), n_entries),
            "context": np.tile(contexts.to_numpy(object), len(log_odds)),
            "latent": np.tile(
                log_odds.columns.get_level_values("latent").to_numpy(object), len(log_odds)
            ),
        }
        | {name: values.to_numpy().ravel() for name, values in columns.items()}
    )
    table["is_null"] = np.repeat(is_null, n_entries)
    table["called"] = called.to_numpy().ravel()
    if not include_null:
        table = table[~table["is_null"]].reset_index(drop=True)
    table.attrs = {"fdr": fdr, "n_null": n_null}
    return table


def _signs_differ(
    model: SAMSVAE, mean: torch.Tensor, variance: torch.Tensor, level: float
) -> pd.DataFrame:
    """Whether shared effect and effect in the context, where masks are one, have sure signs."""
    width = float(norm.ppf(0.5 + level / 2))
    apart = deviation_table(model, mean)
    shared, shared_variance = (
        perturbation_table(model, values)[apart.columns.get_level_values("latent")].to_numpy()
        for values in (mean, variance)
    )
    total = shared + apart
    total_sd = np.sqrt(shared_variance + deviation_table(model, variance))
    sure = (np.abs(shared) > width * np.sqrt(shared_variance)) & (total.abs() > width * total_sd)
    return sure & (np.sign(total) == -np.sign(shared))
