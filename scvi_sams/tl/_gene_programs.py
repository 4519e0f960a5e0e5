"""What each latent does to genes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
import torch
from scvi.utils import track

from scvi_sams.data.tables import profile_frame
from scvi_sams.model.read_outs import (
    MAX_EFFECT_ELEMENTS,
    check_level,
    latent_names,
    provenance,
    require_effects,
)
from scvi_sams.tl.summaries import EffectSummary, summarize_effects, total_variance_share

if TYPE_CHECKING:
    from scvi_sams.data.tables import ProfileTable
    from scvi_sams.model import SAMSVAE
    from scvi_sams.model.counterfactual import Counterfactual


_N_CELLS = 500


@torch.inference_mode()
def gene_programs(
    model: SAMSVAE,
    move: float | Literal["typical"] = 1.0,
    credible_level: float = 0.95,
    *,
    counterfactual: Counterfactual | None = None,
) -> ad.AnnData:
    r"""Effect on each gene of moving each latent, over a population of cells.

    Each latent is moved alone, in cells without a perturbation, and what changes is the expected
    ``log2(1 + 1e4 * x / library)`` (features that are no counts: their expected value). The
    decoder is not linear, so the effect differs between cells. It is known without a posterior,
    so the intervals say how the effect varies over cells, and for ``move="typical"`` over draws
    of its size too; not how well the decoder is known.

    Parameters
    ----------
    model
        A trained model.
    move
        How far each latent is moved, in standard deviations of the basal state; negative for the
        other direction. ``"typical"``: as far as perturbations that use the latent move it, the
        root of the mean over them of the squared effect, weighted by the probability of their
        masks. A cell each gets its own draw of that size.
    credible_level
        Level of the intervals.
    counterfactual
        The cells, from :meth:`SAMSVAE.counterfactual`; 500 basal states from the prior by default.

    Returns
    -------
    anndata.AnnData
        Latents x genes, with the mean effect in ``X``. ``layers``: ``lower``, ``upper``, ``std``
        (over cells) and ``sign_rate``, the share of cells whose effect has the sign of the mean.
        ``obs``, a row a latent:

        * ``move``: mean of how far it was moved
        * ``variance_share``: share of the variance of expression between unperturbed cells that
          would go if the latent were the same in all, summed over genes (Sobol's total-effect
          index). They add up to more than 1 where latents act together, to less where batches
          and covariates count.
        * ``effect_share``: share of the latent in the squared effects of perturbations on
          expression, with the decoder taken as linear; adds up to 1. Only where perturbations act
          by a shift.
        * ``n_perturbations``: expected number of perturbations that use it. Only where there are
          masks.

    Raises
    ------
    NotImplementedError
        For ``move="typical"`` where perturbations do not act by a shift.
    ValueError
        If ``move`` is neither a number that is not 0 nor ``"typical"``, or ``credible_level`` is
        not between 0 and 1.

    See Also
    --------
    top_genes : The genes a programme raises and lowers most.

    Notes
    -----
    The sign of a latent is arbitrary: a programme is read together with the sign of
    :meth:`SAMSVAE.get_perturbation_effect`.

    Examples
    --------
    >>> programs = scvi_sams.tl.gene_programs(model, "typical")  # doctest: +SKIP
    >>> scvi_sams.tl.top_genes(programs, 10)  # doctest: +SKIP
    """
    model._check_if_trained(warn=False)
    is_typical = isinstance(move, str) and move == "typical"
    if not is_typical and (isinstance(move, str) or not np.isfinite(move) or move == 0):
        raise ValueError(f"move={move!r} must be a finite number that is not 0, or 'typical'.")
    if is_typical:
        require_effects(model, "gene_programs(move='typical')")
    check_level(credible_level)
    cells = model.counterfactual(n_cells=_N_CELLS) if counterfactual is None else counterfactual
    states = cells.states
    n_cells, n_latent = states.shape
    with cells.random():
        if is_typical:
            sizes = _typical_moves(model, n_cells)
        else:
            sizes = torch.full((n_cells, n_latent), float(move), device=cells.device)
        redrawn = states[torch.randperm(n_cells).to(cells.device)]
    base = cells.unperturbed()
    summaries, variance_share = [], []
    for latent in track(range(n_latent), description="Programmes", disable=n_latent < 100):
        effects = cells.unperturbed(latent, sizes[:, latent]) - base
        summaries.append(summarize_effects(effects, credible_level))
        change = redrawn[:, latent] - states[:, latent]
        variance_share.append(total_variance_share(base, cells.unperturbed(latent, change)))
    fields = {
        name: np.stack([getattr(summary, name) for summary in summaries]).astype(np.float32)
        for name in EffectSummary._fields
    }
    mean = fields.pop("mean")
    mean_move = sizes.mean(0).cpu().numpy().astype(np.float64)
    obs = pd.DataFrame(
        {"move": mean_move, "variance_share": variance_share}
        | _use_of_latents(model, mean, mean_move),
        index=pd.Index(latent_names(model), name="latent"),
    )
    programs = ad.AnnData(
        mean, obs=obs, var=pd.DataFrame(index=pd.Index(model.get_var_names())), layers=fields
    )
    programs.uns["scvi_sams"] = provenance(model, cells.seed) | {
        "move": str(move),
        "credible_level": credible_level,
        "units": cells.units,
    }
    return programs


def _mask_weights(model: SAMSVAE) -> torch.Tensor:
    """Probability that perturbations use latents, perturbations x latents."""
    effects = require_effects(model, "gene_programs")
    if not effects.sparse:
        return torch.ones(effects.n_perturbations, model.module.n_latent, device=model.device)
    return effects.mask_probability()[: effects.n_perturbations]


def _typical_moves(model: SAMSVAE, n_cells: int) -> torch.Tensor:
    """Draws of how far perturbations move each latent, cells x latents."""
    weights = _mask_weights(model)
    n_draws = max(1, min(n_cells, MAX_EFFECT_ELEMENTS // weights.numel()))
    posterior = require_effects(model, "gene_programs(move='typical')")
    effects = posterior.sample(n_draws)[:, : len(weights)]
    total = weights.sum(0).clamp(min=torch.finfo(weights.dtype).tiny)
    sizes = ((weights * effects.square()).sum(1) / total).sqrt()
    return sizes[torch.arange(n_cells, device=model.device) % n_draws]


def _use_of_latents(model: SAMSVAE, programs: np.ndarray, moves: np.ndarray) -> dict[str, Any]:
    """What perturbations make of each latent, columns with a row a latent."""
    effects = model.module.effects
    if effects is None:
        return {}
    mean, variance = effects.moments(slice(effects.n_perturbations))
    squared = (mean.double().square() + variance.double()).sum(0).cpu().numpy()
    per_move = np.square(programs, dtype=np.float64).sum(1)
    per_unit = np.divide(per_move, moves**2, out=np.zeros_like(per_move), where=moves != 0)
    through = squared * per_unit
    use = {"effect_share": through / max(through.sum(), 1e-300)}
    if effects.sparse:
        use["n_perturbations"] = _mask_weights(model).sum(0).double().cpu().numpy()
    return use


def top_genes(
    programs: ProfileTable, n_genes: int = 20, min_sign_rate: float = 0.0
) -> pd.DataFrame:
    """The genes that programmes raise and lower most.

    Parameters
    ----------
    programs
        Programmes x genes, signed: from :func:`gene_programs`, or any effects.
    n_genes
        Genes of each programme and direction, at most.
    min_sign_rate
        Sign rate that a gene must have (``layers["sign_rate"]``).

    Returns
    -------
    pandas.DataFrame
        A row a gene: ``program``, ``direction`` (``"up"`` or ``"down"``), ``rank`` (from 1),
        ``gene``, ``effect``, and ``sign_rate`` where there is one.

    Raises
    ------
    ScreenError
        If a sign rate is asked for and `programs` has none.
    ValueError
        If a number is out of its range.

    Examples
    --------
    >>> import pandas as pd
    >>> from scvi_sams.tl import top_genes
    >>> effect = pd.DataFrame({"STAT1": [2.0], "ACTB": [0.0], "MYC": [-1.0]}, index=["latent_0"])
    >>> top_genes(effect)[["direction", "rank", "gene"]]
      direction  rank   gene
    0        up     1  STAT1
    1      down     1    MYC
    """
    if n_genes < 1:
        raise ValueError(f"n_genes={n_genes}: at least one is needed.")
    if not 0 <= min_sign_rate <= 1:
        raise ValueError(f"min_sign_rate={min_sign_rate!r} must be between 0 and 1.")
    frame = profile_frame(programs, "programs")
    effects = frame.to_numpy()
    has_rate = not isinstance(programs, pd.DataFrame) and "sign_rate" in programs.layers
    rate = None
    if has_rate or min_sign_rate > 0:
        rate = profile_frame(programs, "programs", layer="sign_rate").to_numpy()
    eligible = np.ones(effects.shape, bool) if rate is None else rate >= min_sign_rate
    rows: list[pd.DataFrame] = []
    for row, name in enumerate(frame.index):
        for direction, sign in (("up", 1), ("down", -1)):
            signed = sign * effects[row]
            order = np.argsort(-signed, kind="stable")
            chosen = order[(signed[order] > 0) & eligible[row, order]][:n_genes]
            table = pd.DataFrame(
                {
                    "program": name,
                    "direction": direction,
                    "rank": np.arange(1, len(chosen) + 1),
                    "gene": frame.columns.to_numpy(object)[chosen],
                    "effect": effects[row, chosen],
                }
            )
            if rate is not None:
                table["sign_rate"] = rate[row, chosen]
            rows.append(table)
    return pd.concat(rows, ignore_index=True)
