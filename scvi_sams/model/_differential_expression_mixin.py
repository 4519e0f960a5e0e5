"""Differential expression between conditions, measured or not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from scvi.utils import track

from scvi_sams._exceptions import ScreenError
from scvi_sams.model._counterfactual_mixin import COUNTS_PER, CounterfactualMixin
from scvi_sams.module.likelihood import expected_expression
from scvi_sams.tl import differential_expression_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

    from scvi_sams.data import ConditionsLike
    from scvi_sams.module.likelihood import Observation

__all__ = ["DifferentialExpressionMixin"]


class DifferentialExpressionMixin(CounterfactualMixin):
    """Differential expression from the posterior of masks and effects."""

    @torch.inference_mode()
    def get_differential_expression(
        self,
        conditions: ConditionsLike | None = None,
        reference: str | dict[str, float] | None = None,
        delta: float = 0.25,
        fdr: float = 0.05,
        n_samples: int = 100,
        n_cells: int = 200,
        credible_level: float = 0.95,
        pseudocount: float = 0.1,
        basal: Literal["prior", "control"] | AnnData | Sequence[int] = "prior",
        batch: str | None = None,
        *,
        seed: int = 0,
    ) -> pd.DataFrame:
        r"""Genes that conditions change, whether or not they were ever measured.

        Every draw of masks and effects is applied to the same basal states, under the condition
        and under the reference, and

        .. math:: \mathrm{lfc}_g = \log_2 \frac{\bar s_g(\mathrm{condition}) + c}
           {\bar s_g(\mathrm{reference}) + c}

        with :math:`\bar s_g` the mean over cells of the expected counts per 10,000. Draws differ
        by what is uncertain about the perturbations alone: the decoder is taken as known.
        :meth:`differential_expression`, which scvi-tools brings, compares groups of cells that
        were measured.

        Parameters
        ----------
        conditions
            As in :meth:`predict`; all single perturbations by default.
        reference
            What conditions are compared with; no perturbation by default.
        delta
            Absolute log2 fold change that is worth calling.
        fdr
            Expected false discovery rate of the calls of a condition.
        n_samples
            Draws of masks and effects.
        n_cells
            Cells of the population. Ignored if ``basal`` is cells.
        credible_level
            Level of the interval.
        pseudocount
            Added to counts per 10,000, so that genes that are hardly seen do not lead the table.
        basal, batch
            Where basal states come from, and the batch, as in :meth:`predict`.
        seed
            Seed of the population and of the draws.

        Returns
        -------
        A row for each condition and gene, with the genes in the index, by falling ``proba_de``
        within a condition. Columns as in scvi-tools, and those of
        :func:`~scvi_sams.tl.differential_expression_table`: ``comparison``,
        ``group1`` (condition), ``group2`` (reference), ``proba_de``, ``proba_not_de``,
        ``bayes_factor``, ``scale1`` and ``scale2`` (expected counts per 10,000), ``delta``,
        ``lfc_mean``, ``lfc_median``, ``lfc_std``, ``lfc_min``, ``lfc_max``, ``lfc_lower``,
        ``lfc_upper``, ``lfsr``, ``q_value`` and ``is_de_fdr_<fdr>``. For features that are no
        counts (``gene_likelihood="normal"``) ``lfc`` is the difference of the expected features.

        Raises
        ------
        NotImplementedError
            If perturbations do not act by a shift, and have no posterior (ConditionalVAE).
        UnknownPerturbationError
            If a condition names a perturbation that the model has not seen.
        ScreenError
            If an argument cannot be used with this model.
        ValueError
            If ``delta``, ``fdr``, ``credible_level`` or ``pseudocount`` is out of its range.

        Examples
        --------
        >>> table = model.get_differential_expression(["KLF1", "KLF1+CEBPA"])  # doctest: +SKIP
        >>> table.query("group1 == 'KLF1' and `is_de_fdr_0.05`")  # doctest: +SKIP
        """
        self._require_effects("get_differential_expression")
        if not 0 < pseudocount < np.inf:
            raise ValueError(f"pseudocount={pseudocount!r} must be positive and finite.")
        if n_samples < 1:
            raise ScreenError(f"n_samples={n_samples}: at least one draw is needed.")
        # Refused before the work, not after it.
        differential_expression_table(np.zeros((1, 1)), ["gene"], delta, fdr, credible_level)
        dosage, labels = self._parse_distinct_conditions(
            self.perturbation_names if conditions is None else conditions
        )
        against_what = self._parse_conditions({} if reference is None else reference)
        reference_dosage, reference_labels = against_what.matrix, against_what.labels
        if len(reference_labels) != 1:
            raise ScreenError(f"reference={reference!r} is more than one condition: give one.")
        used = sparse.vstack([reference_dosage, dosage], "csr")
        is_count_model = self.module.is_count_model
        with self._seeded(seed):
            population, _ = self._population(basal, n_cells, batch, None)
            draws = self._sample_globals(n_samples, used)

        def scales(row: int) -> np.ndarray:
            return self._population_means(population, used, row, draws, _expected).astype(float)

        genes = self.get_var_names()
        against = scales(0)
        tables = []
        for row, label in enumerate(
            track(labels, description="Differential expression", disable=len(labels) < 20)
        ):
            scale = scales(row + 1)
            if is_count_model:
                factor = COUNTS_PER
                lfc = np.log2(factor * scale + pseudocount) - np.log2(
                    factor * against + pseudocount
                )
            else:
                factor, lfc = 1.0, scale - against
            table = differential_expression_table(lfc, genes, delta, fdr, credible_level)
            table.insert(3, "scale1", factor * scale.mean(0))
            table.insert(4, "scale2", factor * against.mean(0))
            table.insert(5, "delta", delta)
            for name, text in (
                ("group2", reference_labels[0]),
                ("group1", label),
                ("comparison", f"{label} vs {reference_labels[0]}"),
            ):
                table.insert(0, name, text)
            size = table["lfc_mean"].abs()
            order = np.lexsort((-size.to_numpy(), -table["proba_de"].to_numpy()))
            tables.append(table.iloc[order])
        found = pd.concat(tables)
        found.attrs = self._provenance() | {"seed": seed, "n_samples": n_samples}
        return found


def _expected(px: Observation, library: torch.Tensor) -> torch.Tensor:
    return expected_expression(px)
