"""What is learned of perturbations: masks, effects, shifts, and their extensions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from scipy import stats

from scvi_sams.model._base import SAMSModel
from scvi_sams.module.doses import Doses

if TYPE_CHECKING:
    from scvi_sams.data import ConditionsLike
    from scvi_sams.module.posteriors import EffectsPosterior

__all__ = ["EffectsMixin"]


class EffectsMixin(SAMSModel):
    """Masks, effects and shifts of perturbations, labelled."""

    def get_perturbation_mask(self) -> pd.DataFrame:
        """Probability that each perturbation moves each latent.

        Returns
        -------
        Posterior inclusion probabilities, perturbations x latents. With ``mask_evidence_cells``
        they are those of a coarsened posterior: an effect must exceed the background by a fixed
        size, not only be detectable, and is charged for having chosen the direction of a latent
        that no other perturbation uses. Predictions use the posterior without that charge.
        ``attrs["mask_prior"]`` holds the prior probability, see :meth:`get_mask_prior`.

        Raises
        ------
        NotImplementedError
            If the model has no masks.

        Examples
        --------
        >>> mask = model.get_perturbation_mask()  # doctest: +SKIP
        >>> mask.index[mask.gt(0.5).any(axis=1)]  # doctest: +SKIP
        """
        effects = self._require_masks("get_perturbation_mask")
        frame = self._perturbation_frame(effects.mask_probability())
        frame.attrs["mask_prior"] = effects.mask_prior.mean().squeeze().tolist()
        return frame

    def get_mask_prior(self, credible_level: float = 0.95) -> pd.DataFrame:
        """Prior probability that a mask is one, given or learned.

        A learned probability counts what is left of doubt about masks that are off, which
        saturating evidence (``mask_evidence_cells``) never takes away: on simulated screens it
        lies some 0.1 above the share of masks that are on. Count those for the density.

        Parameters
        ----------
        credible_level
            Level of the interval.

        Returns
        -------
        Posterior mean and ends of the interval of the probability, in columns ``mean``,
        ``lower`` and ``upper``, with a row for each perturbation or latent that has one of its
        own, or one row ``all``. A probability that was given has an interval of no width.

        Raises
        ------
        NotImplementedError
            If the model has no masks.

        Examples
        --------
        >>> model = SAMSVAE(adata, mask_prior=(1, 20))  # doctest: +SKIP
        >>> model.get_mask_prior()  # doctest: +SKIP
        """
        prior = self._require_masks("get_mask_prior").mask_prior
        _check_level(credible_level)
        mean = prior.mean().cpu().numpy().ravel()
        tails = np.array([0.5 - credible_level / 2, 0.5 + credible_level / 2])
        if prior.fixed is not None:
            lower, upper = mean, mean
        else:
            a, b = (t.cpu().numpy().ravel() for t in (prior.posterior_a, prior.posterior_b))
            lower, upper = (stats.beta.ppf(tail, a, b) for tail in tails)
        index = ["all"]
        if len(mean) > 1 or (prior.fixed is None and prior.shared_by != "all"):
            is_latent = prior.shared_by == "latent"
            index = self._latent_names if is_latent else self.perturbation_names
        return pd.DataFrame({"mean": mean, "lower": lower, "upper": upper}, index=index)

    def get_perturbation_effect(self) -> pd.DataFrame:
        """Expected effect of each perturbation: mask times embedding.

        Returns
        -------
        ``E[m * e]``, perturbations x latents, in standard deviations of the basal state. The
        learned background (``spike_scale``) is not in it; :meth:`get_perturbation_shift` has both.

        Raises
        ------
        NotImplementedError
            If perturbations do not act by a shift.

        Examples
        --------
        >>> model.get_perturbation_effect().loc["STAT1"]  # doctest: +SKIP
        """
        effects = self._require_effects("get_perturbation_effect")
        if hasattr(effects, "code"):
            with torch.no_grad():
                return self._perturbation_frame(effects.moments()[0])
        return self._perturbation_frame(effects.mask_probability() * effects.slab_mean)

    def get_perturbation_shift(self, conditions: ConditionsLike) -> pd.DataFrame:
        """Expected shift of the latent state under conditions, measured or not.

        Parameters
        ----------
        conditions
            Labels (``"A"``, ``"A+B"``), dicts (``{"A": 1.0, "B": 0.5}``) or a dosage matrix.

        Returns
        -------
        Conditions x latents, in standard deviations of the basal state.

        Raises
        ------
        UnknownPerturbationError
            If a condition names a perturbation that the model has not seen.
        NotImplementedError
            If perturbations do not act by a shift.

        Examples
        --------
        >>> model.get_perturbation_shift(["KLF1", "KLF1+CEBPA"])  # doctest: +SKIP
        """
        self._require_effects("get_perturbation_shift")
        asked = self._parse_conditions(conditions)
        columns = (asked.cell_index, asked.cell_dose)
        doses = Doses(*(torch.as_tensor(part, device=self.device) for part in columns))
        with torch.inference_mode():
            shift = self.module.expected_shift(doses)
        return pd.DataFrame(
            shift.cpu().numpy(), index=asked.cell_labels, columns=self._latent_names
        )

    def get_interaction_mask(self) -> pd.DataFrame:
        """Probability that each measured pair moves each latent beyond the sum of its parts.

        Returns
        -------
        Posterior inclusion probabilities, pairs x latents, with pairs written ``"A+B"``.

        Raises
        ------
        NotImplementedError
            If the model has no interactions (``interactions=True``).

        Examples
        --------
        >>> model = SAMSVAE(adata, interactions=True)  # doctest: +SKIP
        >>> model.get_interaction_mask().loc["KLF1+CEBPA"]  # doctest: +SKIP
        """
        effects = self._require_interactions("get_interaction_mask")
        return self._pair_frame(effects.mask_probability())

    def get_interaction_effect(self) -> pd.DataFrame:
        """Expected shift of each measured pair beyond the sum of its parts, at unit doses.

        Returns
        -------
        ``E[m * e]``, pairs x latents, in standard deviations of the basal state.

        Raises
        ------
        NotImplementedError
            If the model has no interactions (``interactions=True``).

        Examples
        --------
        >>> model = SAMSVAE(adata, interactions=True)  # doctest: +SKIP
        >>> model.get_interaction_effect().loc["KLF1+CEBPA"]  # doctest: +SKIP
        """
        effects = self._require_interactions("get_interaction_effect")
        return self._pair_frame(effects.mask_probability() * effects.slab_mean)

    def get_dose_response(self, credible_level: float = 0.95) -> pd.DataFrame:
        """Parameters of the response of each perturbation to its dose.

        Parameters
        ----------
        credible_level
            Level of the intervals.

        Returns
        -------
        Columns ``ec50``, ``ec50_lower``, ``ec50_upper`` (in units of the dose), ``slope``,
        ``slope_lower`` and ``slope_upper`` (Hill coefficient), a row a perturbation. Point
        estimates are posterior medians.

        Raises
        ------
        NotImplementedError
            If shifts are linear in the dose (``dose_response="hill"`` is not on).

        Examples
        --------
        >>> model = SAMSVAE(adata, dose_response="hill")  # doctest: +SKIP
        >>> model.get_dose_response()  # doctest: +SKIP
        """
        self._check_if_trained(warn=False)
        curves = getattr(self.module, "dose_response", None)
        if curves is None:
            raise NotImplementedError(
                f"get_dose_response: this {type(self).__name__} has no curves of the dose; make "
                "SAMSVAE or CPAVAE with dose_response='hill' for shifts that saturate."
            )
        _check_level(credible_level)
        width = stats.norm.ppf(0.5 + credible_level / 2)
        table = {}
        names = ("ec50", "slope")
        for name, mean, std in zip(names, curves.mean(), curves.std(), strict=True):
            center = mean.detach().cpu().numpy()
            spread = width * std.detach().cpu().numpy()
            table[name] = np.exp(center)
            table[f"{name}_lower"] = np.exp(center - spread)
            table[f"{name}_upper"] = np.exp(center + spread)
        return pd.DataFrame(table, index=self._perturbation_index)

    def get_direct_effect(self, credible_level: float = 0.95) -> pd.DataFrame:
        """Log fold change of each perturbation on the gene that it targets.

        It is the part that does not pass through latents.

        Parameters
        ----------
        credible_level
            Level of the intervals.

        Returns
        -------
        Columns ``gene``, ``log2_fold_change``, ``lower`` and ``upper``, a row for each
        perturbation that has a target among the genes.

        Raises
        ------
        NotImplementedError
            If the model has no direct effects (``direct_effects=True``).

        Examples
        --------
        >>> model = SAMSVAE(adata, direct_effects=True)  # doctest: +SKIP
        >>> model.get_direct_effect()  # doctest: +SKIP
        """
        self._check_if_trained(warn=False)
        direct = getattr(self.module, "direct_effects", None)
        if direct is None:
            raise NotImplementedError(
                f"get_direct_effect: this {type(self).__name__} has no direct effects; make "
                "SAMSVAE or CPAVAE with direct_effects=True, or with a dict of the gene that each "
                "perturbation targets."
            )
        _check_level(credible_level)
        target = direct.target.cpu().numpy()
        has_target = target >= 0
        mean = direct.mean.detach().cpu().numpy()[has_target]
        std = (0.5 * direct.log_variance).exp().detach().cpu().numpy()[has_target]
        width = stats.norm.ppf(0.5 + credible_level / 2) * std
        genes = np.asarray(self.get_var_names())[target[has_target]]
        log2 = np.log(2)
        return pd.DataFrame(
            {
                "gene": genes,
                "log2_fold_change": mean / log2,
                "lower": (mean - width) / log2,
                "upper": (mean + width) / log2,
            },
            index=self._perturbation_index[has_target],
        )

    # -- shared steps --------------------------------------------------------------------------

    def _require_masks(self, method: str) -> EffectsPosterior:
        """The effects, unless they have no masks."""
        effects = self._require_effects(method)
        if not effects.sparse:
            raise NotImplementedError(
                f"{method}: {type(self).__name__} as it was made has no masks, every perturbation "
                "moves every latent. Its effects are in get_perturbation_effect(); for masks use "
                "SAMSVAE with a mask_prior below one."
            )
        return effects

    def _require_interactions(self, method: str) -> EffectsPosterior:
        """The effects, unless pairs have none of their own."""
        effects = self._require_effects(method)
        if effects.n_pairs == 0:
            raise NotImplementedError(
                f"{method}: this model has no interactions, pairs act by the sum of their parts; "
                "make SAMSVAE with interactions=True."
            )
        return effects

    @property
    def _perturbation_index(self) -> pd.Index:
        return pd.Index(self.perturbation_names, name="perturbation")

    def _perturbation_frame(self, values: torch.Tensor) -> pd.DataFrame:
        index = self._perturbation_index
        array = values[: len(index)].detach().cpu().numpy()
        return pd.DataFrame(array, index=index, columns=self._latent_names)

    def _pair_frame(self, values: torch.Tensor) -> pd.DataFrame:
        names = self.perturbation_names
        pairs = self.module.interactions.pairs
        return pd.DataFrame(
            values[len(names) :].detach().cpu().numpy(),
            index=pd.Index([self._delimiter.join((names[a], names[b])) for a, b in pairs]),
            columns=self._latent_names,
        )


def _check_level(credible_level: float) -> None:
    if not 0 < credible_level < 1:
        raise ValueError(f"credible_level={credible_level!r} must be between 0 and 1.")
