"""What extensions of the model learned: priors, doses, target genes, pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import stats

from scvi_sams.model.read_outs import (
    check_level,
    latent_names,
    pair_table,
    require_effects,
    require_part,
)

if TYPE_CHECKING:
    from scvi_sams.model import SAMSVAE


def mask_prior(model: SAMSVAE, credible_level: float = 0.95) -> pd.DataFrame:
    """Prior probability that a mask is one, given or learned.

    A learned probability counts what is left of doubt about masks that are off, which saturating
    evidence (``mask_evidence_cells``) never takes away: on simulated screens it lies some 0.1
    above the share of masks that are on. Count those for the density.

    Parameters
    ----------
    model
        A trained model with masks.
    credible_level
        Level of the interval.

    Returns
    -------
    pandas.DataFrame
        Posterior mean and ends of the interval of the probability, in columns ``mean``, ``lower``
        and ``upper``, with a row for each perturbation or latent that has one of its own, or one
        row ``all``. A probability that was given has an interval of no width.

    Raises
    ------
    NotImplementedError
        If the model has no masks.
    ValueError
        If ``credible_level`` is not between 0 and 1.

    Examples
    --------
    >>> model = SAMSVAE(adata, mask_prior=(1, 20))  # doctest: +SKIP
    >>> scvi_sams.tl.mask_prior(model)  # doctest: +SKIP
    """
    prior = require_effects(model, "mask_prior", masks=True).mask_prior
    check_level(credible_level)
    mean = prior.mean().cpu().numpy().ravel()
    index = ["all"]
    if prior.fixed is not None:
        lower = upper = mean
    else:
        a, b = (t.cpu().numpy().ravel() for t in (prior.posterior_a, prior.posterior_b))
        tail = 0.5 - credible_level / 2
        lower, upper = stats.beta.ppf([[tail], [1 - tail]], a, b)
        if prior.shared_by != "all":
            is_latent = prior.shared_by == "latent"
            index = latent_names(model) if is_latent else model.perturbation_names
    return pd.DataFrame({"mean": mean, "lower": lower, "upper": upper}, index=index)


def dose_response(model: SAMSVAE, credible_level: float = 0.95) -> pd.DataFrame:
    """Parameters of the response of each perturbation to its dose.

    Parameters
    ----------
    model
        A trained model made with ``dose_response="hill"``.
    credible_level
        Level of the intervals.

    Returns
    -------
    pandas.DataFrame
        Columns ``ec50``, ``ec50_lower``, ``ec50_upper`` (in units of the dose), ``slope``,
        ``slope_lower`` and ``slope_upper`` (Hill coefficient), a row a perturbation. Point
        estimates are posterior medians.

    Raises
    ------
    NotImplementedError
        If shifts are linear in the dose.
    ValueError
        If ``credible_level`` is not between 0 and 1.

    Examples
    --------
    >>> model = SAMSVAE(adata, dose_response="hill")  # doctest: +SKIP
    >>> scvi_sams.tl.dose_response(model)  # doctest: +SKIP
    """
    curves = require_part(
        model,
        "dose_response",
        "has no curves of the dose; make SAMSVAE or CPAVAE with dose_response='hill' for shifts "
        "that saturate.",
    )
    check_level(credible_level)
    width = stats.norm.ppf(0.5 + credible_level / 2)
    table = {}
    for name, mean, std in zip(("ec50", "slope"), curves.mean(), curves.std(), strict=True):
        center = mean.detach().cpu().numpy()
        spread = width * std.detach().cpu().numpy()
        table[name] = np.exp(center)
        table[f"{name}_lower"] = np.exp(center - spread)
        table[f"{name}_upper"] = np.exp(center + spread)
    return pd.DataFrame(table, index=pd.Index(model.perturbation_names, name="perturbation"))


def direct_effects(model: SAMSVAE, credible_level: float = 0.95) -> pd.DataFrame:
    """Log fold change of each perturbation on the gene that it targets.

    It is the part that does not pass through latents.

    Parameters
    ----------
    model
        A trained model with direct effects.
    credible_level
        Level of the intervals.

    Returns
    -------
    pandas.DataFrame
        Columns ``gene``, ``log2_fold_change``, ``lower`` and ``upper``, a row for each
        perturbation that has a target among the genes.

    Raises
    ------
    NotImplementedError
        If the model has no direct effects.
    ValueError
        If ``credible_level`` is not between 0 and 1.

    Examples
    --------
    >>> model = SAMSVAE(adata, direct_effects=True)  # doctest: +SKIP
    >>> scvi_sams.tl.direct_effects(model)  # doctest: +SKIP
    """
    direct = require_part(
        model,
        "direct_effects",
        "has no direct effects; make SAMSVAE or CPAVAE with direct_effects=True, or with a dict "
        "of the gene that each perturbation targets.",
    )
    check_level(credible_level)
    target = direct.target.cpu().numpy()
    has_target = target >= 0
    mean = direct.mean.detach().cpu().numpy()[has_target]
    std = (0.5 * direct.log_variance).exp().detach().cpu().numpy()[has_target]
    width = stats.norm.ppf(0.5 + credible_level / 2) * std
    names = pd.Index(model.perturbation_names, name="perturbation")
    return pd.DataFrame(
        {
            "gene": np.asarray(model.get_var_names())[target[has_target]],
            "log2_fold_change": mean / np.log(2),
            "lower": (mean - width) / np.log(2),
            "upper": (mean + width) / np.log(2),
        },
        index=names[has_target],
    )


def interaction_effects(model: SAMSVAE) -> pd.DataFrame:
    """What measured pairs do to latents beyond the sum of their parts, at unit doses.

    Parameters
    ----------
    model
        A trained model made with ``interactions``.

    Returns
    -------
    pandas.DataFrame
        A row for each pair and latent: ``pair`` (``"A+B"``), ``latent``,
        ``inclusion_probability`` (that the pair moves the latent beyond the sum) and ``effect``
        (probability times the mean of the embedding, in standard deviations of the basal state).

    Raises
    ------
    NotImplementedError
        If the model has no interactions.

    Examples
    --------
    >>> model = SAMSVAE(adata, interactions=True)  # doctest: +SKIP
    >>> table = scvi_sams.tl.interaction_effects(model)  # doctest: +SKIP
    >>> table.pivot(index="pair", columns="latent", values="effect")  # doctest: +SKIP
    """
    effects = require_effects(model, "interaction_effects", pairs=True)
    probability = effects.mask_probability()
    mask, effect = (
        pair_table(model, probability),
        pair_table(model, probability * effects.slab_mean),
    )
    n_pairs, n_latent = mask.shape
    return pd.DataFrame(
        {
            "pair": np.repeat(mask.index.to_numpy(object), n_latent),
            "latent": np.tile(mask.columns.to_numpy(object), n_pairs),
            "inclusion_probability": mask.to_numpy().ravel(),
            "effect": effect.to_numpy().ravel(),
        }
    )
