"""What each latent does to genes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import anndata as ad
import numpy as np
import pandas as pd
import torch
from scipy import sparse
from scvi.utils import track

from scvi_sams.model._counterfactual_mixin import CounterfactualMixin
from scvi_sams.tl import EffectSummary, summarize_effects, total_variance_share

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

    from scvi_sams.module.base import CellPopulation

__all__ = ["GeneProgramsMixin"]

_MAX_EFFECT_ELEMENTS = 50_000_000  # of the draws of all effects held at once


class GeneProgramsMixin(CounterfactualMixin):
    """Latents as gene programmes."""

    @torch.inference_mode()
    def get_gene_programs(
        self,
        move: float | Literal["typical"] = 1.0,
        n_cells: int = 500,
        credible_level: float = 0.95,
        basal: Literal["prior", "control"] | AnnData | Sequence[int] = "prior",
        batch: str | None = None,
        *,
        seed: int = 0,
    ) -> AnnData:
        r"""Effect on each gene of moving each latent, over a population of cells.

        Each latent is moved alone, in cells without a perturbation, and what changes is the
        expected ``log2(1 + 1e4 * x / library)`` (features that are no counts: their expected
        value). The decoder is not linear, so the effect differs between cells. It is known
        without a posterior, so the intervals say how the effect varies over cells, and for
        ``move="typical"`` over draws of its size too; not how well the decoder is known.

        Parameters
        ----------
        move
            How far each latent is moved, in standard deviations of the basal state; negative for
            the other direction. ``"typical"``: as far as perturbations that use the latent move
            it, the root of the mean over them of the squared effect, weighted by the probability
            of their masks. A cell each gets its own draw of that size.
        n_cells
            Cells of the population. Ignored if ``basal`` is cells.
        credible_level
            Level of the intervals.
        basal, batch
            Where basal states come from, and the batch, as in :meth:`predict`.
        seed
            Seed of the population and of the draws.

        Returns
        -------
        AnnData, latents x genes, with the mean effect in ``X``. ``layers``: ``lower``, ``upper``,
        ``std`` (over cells) and ``sign_rate``, the share of cells whose effect has the sign of
        the mean. ``obs``, a row a latent:

        * ``move``: mean of how far it was moved
        * ``variance_share``: share of the variance of expression between unperturbed cells that
          would go if the latent were the same in all, summed over genes
          (:func:`~scvi_sams.tl.total_variance_share`). They add up to more than 1
          where latents act together, to less where batches and covariates count.
        * ``effect_share``: share of the latent in the squared effects of perturbations on
          expression, with the decoder taken as linear; adds up to 1. Only where perturbations act
          by a shift.
        * ``n_perturbations``: expected number of perturbations that use it. Only where there are
          masks.

        Raises
        ------
        NotImplementedError
            For ``move="typical"`` where perturbations do not act by a shift.
        ScreenError
            If ``basal`` or ``batch`` cannot be used with this model.
        ValueError
            If ``move`` is neither a number that is not 0 nor ``"typical"``, or
            ``credible_level`` is not between 0 and 1.

        See Also
        --------
        scvi_sams.tl.top_genes : The genes a programme raises and lowers most.
        scvi_sams.tl.gene_set_enrichment : The gene sets it is made of.

        Notes
        -----
        The sign of a latent is arbitrary: a programme is read together with the sign of
        :meth:`get_perturbation_effect`.

        Examples
        --------
        >>> programs = model.get_gene_programs("typical")  # doctest: +SKIP
        >>> scvi_sams.tl.top_genes(programs, 10)  # doctest: +SKIP
        >>> scvi_sams.tl.gene_set_enrichment(
        ...     programs, "hallmarks.gmt"
        ... )  # doctest: +SKIP
        """
        self._check_if_trained(warn=False)
        is_typical = isinstance(move, str) and move == "typical"
        if not is_typical and (isinstance(move, str) or not np.isfinite(move) or move == 0):
            raise ValueError(f"move={move!r} must be a finite number that is not 0, or 'typical'.")
        if is_typical:
            self._require_effects("get_gene_programs(move='typical')")
        # Refused before the work, not after it.
        summarize_effects(np.zeros((1, 1)), credible_level)
        n_latent = self.module.n_latent
        with self._seeded(seed):
            population, _ = self._population(basal, n_cells, batch, None)
            n_cells = len(population.basal)
            if is_typical:
                sizes = self._typical_moves(n_cells)
            else:
                sizes = torch.full((n_cells, n_latent), float(move), device=self.device)
            anew = population.basal[torch.randperm(n_cells).to(self.device)]
        base = self._unperturbed(population)
        lat = self.module.to_latents(population.basal, population.basal)[0]
        anew = self.module.to_latents(anew, anew)[0]
        tn = self.module.to_network
        summaries, variance_share = [], []
        for latent in track(range(n_latent), description="Programmes", disable=n_latent < 100):
            moved = lat.clone()
            moved[:, latent] += sizes[:, latent]
            effects = self._unperturbed(population._replace(basal=tn(moved))) - base
            summaries.append(summarize_effects(effects, credible_level))
            moved = lat.clone()
            moved[:, latent] = anew[:, latent]
            redrawn = self._unperturbed(population._replace(basal=tn(moved)))
            variance_share.append(total_variance_share(base, redrawn))
        fields = {
            name: np.stack([getattr(summary, name) for summary in summaries]).astype(np.float32)
            for name in EffectSummary._fields
        }
        mean = fields.pop("mean")
        mean_move = sizes.mean(0).cpu().numpy().astype(np.float64)
        obs = pd.DataFrame(
            {"move": mean_move, "variance_share": variance_share},
            index=pd.Index(self._latent_names, name="latent"),
        )
        obs = obs.join(self._use_of_latents(mean, mean_move))
        programs = ad.AnnData(
            mean, obs=obs, var=pd.DataFrame(index=pd.Index(self.get_var_names())), layers=fields
        )
        programs.uns["scvi_sams"] = self._provenance() | {
            "seed": seed,
            "move": str(move),
            "credible_level": credible_level,
            "units": self._expression_units,
        }
        return programs

    def _unperturbed(self, population: CellPopulation) -> np.ndarray:
        """Expression of the cells of a population without a perturbation, cells x genes."""
        nothing = sparse.csr_matrix((1, len(self.perturbation_names)), dtype=np.float32)
        draws = self._sample_globals(1, nothing)
        px = self.module.decode_condition(population, self._doses(nothing, 0), draws)
        values = self._expression_scale(px, population.library)
        return np.asarray(values.squeeze(0).cpu().numpy())

    def _mask_weights(self) -> torch.Tensor:
        """Probability that perturbations use latents, perturbations x latents."""
        effects = self._require_effects("get_gene_programs")
        n_perturbations = len(self.perturbation_names)
        if not effects.sparse:
            return torch.ones(n_perturbations, self.module.n_latent, device=self.device)
        return effects.mask_probability()[:n_perturbations]

    def _typical_moves(self, n_cells: int) -> torch.Tensor:
        """Draws of how far perturbations move each latent, cells x latents."""
        weights = self._mask_weights()
        n_draws = max(1, min(n_cells, _MAX_EFFECT_ELEMENTS // weights.numel()))
        posterior = self._require_effects("get_gene_programs(move='typical')")
        effects = posterior.sample(n_draws)[:, : len(weights)]
        total = weights.sum(0).clamp(min=torch.finfo(weights.dtype).tiny)
        sizes = ((weights * effects.square()).sum(1) / total).sqrt()
        return sizes[torch.arange(n_cells, device=self.device) % n_draws]

    def _use_of_latents(self, programs: np.ndarray, moves: np.ndarray) -> pd.DataFrame:
        """What perturbations make of each latent, a row a latent."""
        index = pd.Index(self._latent_names, name="latent")
        effects = self.module.effects
        if effects is None:
            return pd.DataFrame(index=index)
        n_perturbations = len(self.perturbation_names)
        with torch.no_grad():
            mean, variance = effects.moments(torch.arange(n_perturbations, device=self.device))
        squared = (mean.double().square() + variance.double()).sum(0).cpu().numpy()
        per_move = np.square(programs, dtype=np.float64).sum(1)
        per_unit = np.divide(per_move, moves**2, out=np.zeros_like(per_move), where=moves != 0)
        through = squared * per_unit
        use = pd.DataFrame({"effect_share": through / max(through.sum(), 1e-300)}, index=index)
        if effects.sparse:
            use["n_perturbations"] = self._mask_weights().sum(0).double().cpu().numpy()
        return use
