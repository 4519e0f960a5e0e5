"""Average effects of conditions, with intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import anndata as ad
import numpy as np
import pandas as pd
import torch
from scipy import sparse
from scvi.utils import track

from scvi_sams._exceptions import ScreenError
from scvi_sams.model._counterfactual_mixin import COUNTS_PER, CounterfactualMixin
from scvi_sams.module.likelihood import expected_expression

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

    from scvi_sams.data import ConditionsLike
    from scvi_sams.module.likelihood import Observation

__all__ = ["TreatmentEffectMixin"]


class TreatmentEffectMixin(CounterfactualMixin):
    """Average effects of any condition, never looking at cells of that condition."""

    @torch.inference_mode()
    def get_average_treatment_effect(
        self,
        conditions: ConditionsLike | None = None,
        reference: str | dict[str, float] | None = None,
        method: Literal["log_normalized", "mean"] | None = None,
        n_samples: int = 25,
        n_cells: int = 200,
        credible_level: float = 0.95,
        basal: Literal["prior", "control"] | AnnData | Sequence[int] = "prior",
        batch: str | None = None,
    ) -> AnnData:
        """Average effect of conditions on each gene, over a population of cells.

        Every draw of masks and effects is applied to the same basal states, and expectations over
        counts are computed, not sampled (:func:`~scvi_sams.module.expected_log_normalized`), so
        that the draws differ by what is uncertain about the perturbations alone.

        Parameters
        ----------
        conditions
            As in :meth:`predict`; all single perturbations by default.
        reference
            What effects are measured against; no perturbation by default.
        method
            ``"log_normalized"``: difference of the mean of ``log2(1 + 1e4 * x / library)``, as
            computed from observed counts (Bereket and Karaletsos 2023); the default for counts.
            ``"mean"``: difference of the expected counts per 10,000; for features that are no
            counts, of their expected values.
        n_samples
            Draws of masks and effects, which the intervals are made of.
        n_cells
            Cells of the population.
        credible_level
            Level of the intervals.
        basal
            Where basal states come from, as in :meth:`predict`.
        batch
            Batch to predict for, as in :meth:`predict`.

        Returns
        -------
        AnnData, conditions x genes: posterior mean in ``X``, ends of the interval in
        ``layers["lower"]`` and ``layers["upper"]``, posterior standard deviation in
        ``layers["std"]``; NaN where perturbations act through networks (ConditionalVAE), which
        have no posterior.

        Raises
        ------
        UnknownPerturbationError
            If a condition names a perturbation that the model has not seen.
        ScreenError
            If a condition is given twice, or ``n_samples``, ``basal`` or ``batch`` cannot be used.
        ValueError
            If ``method`` is unknown or not for this likelihood, or ``credible_level`` is not
            between 0 and 1.

        Examples
        --------
        >>> effect = model.get_average_treatment_effect(["KLF1", "KLF1+CEBPA"])  # doctest: +SKIP
        >>> effect.to_df().loc["KLF1"].nlargest(10)  # doctest: +SKIP
        """
        if method is None:
            method = "log_normalized" if self.module.is_count_model else "mean"
        if method not in {"log_normalized", "mean"}:
            raise ValueError(f"method={method!r} is unknown; use 'log_normalized' or 'mean'.")
        if method == "log_normalized" and not self.module.is_count_model:
            raise ValueError(
                "method='log_normalized' is for counts, and this model has "
                "gene_likelihood='normal'; use method='mean'."
            )
        self._check_if_trained(warn=False)
        if not 0 < credible_level < 1:
            raise ValueError(f"credible_level={credible_level!r} must be between 0 and 1.")
        dosage, labels = self._parse_distinct_conditions(
            self.perturbation_names if conditions is None else conditions
        )
        reference_dosage = self._parse_conditions({} if reference is None else reference).matrix
        population, _ = self._population(basal, n_cells, batch, None)
        used = sparse.vstack([reference_dosage, dosage], "csr")
        if n_samples < 1:
            raise ScreenError(f"n_samples={n_samples}: at least one draw is needed.")
        draws = self._sample_globals(n_samples, used)
        statistic = self._expression_scale if method == "log_normalized" else self._mean_scale

        def population_means(row: int) -> np.ndarray:
            return self._population_means(population, used, row, draws, statistic)

        against = population_means(0)
        tail = 50 * (1 - credible_level)
        columns: dict[str, list[np.ndarray]] = {"mean": [], "lower": [], "upper": [], "std": []}
        for row in track(range(len(labels)), description="Effects", disable=len(labels) < 20):
            effects = population_means(row + 1) - against
            columns["mean"].append(effects.mean(0))
            if self.module.effects is None:  # no posterior, so nothing to say how sure it is
                effects = np.full_like(effects, np.nan)
            columns["std"].append(effects.std(0))
            lower, upper = np.percentile(effects, [tail, 100 - tail], axis=0)
            columns["lower"].append(lower)
            columns["upper"].append(upper)
        layers = {name: np.stack(rows).astype(np.float32) for name, rows in columns.items()}
        effect = ad.AnnData(
            layers.pop("mean"),
            obs=pd.DataFrame(index=pd.Index(labels, name="condition")),
            var=pd.DataFrame(index=pd.Index(self.get_var_names())),
            layers=layers,
        )
        effect.uns["scvi_sams"] = self._provenance() | {
            "method": method,
            "credible_level": credible_level,
        }
        return effect

    def _mean_scale(self, px: Observation, library: torch.Tensor) -> torch.Tensor:
        """Expected counts per 10,000, or features."""
        values = expected_expression(px)
        return COUNTS_PER * values if self.module.is_count_model else values
