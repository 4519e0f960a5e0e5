"""Genes that conditions change, measured or not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scvi_sams._arguments import checked
from scvi_sams._exceptions import ScreenError
from scvi_sams.model.prediction import compared_means
from scvi_sams.model.read_outs import provenance, require_effects
from scvi_sams.tl.summaries import differential_expression_table

if TYPE_CHECKING:
    from scvi_sams.data import ConditionsLike
    from scvi_sams.model import SAMSVAE
    from scvi_sams.model.counterfactual import Counterfactual


def differential_expression(
    model: SAMSVAE,
    conditions: ConditionsLike | None = None,
    reference: str | dict[str, float] | None = None,
    delta: float = 0.25,
    fdr: float = 0.05,
    n_samples: int = 100,
    credible_level: float = 0.95,
    pseudocount: float = 0.1,
    *,
    counterfactual: Counterfactual | None = None,
    context: str | None = None,
) -> pd.DataFrame:
    r"""Genes that conditions change, whether or not they were ever measured.

    Every draw of masks and effects is applied to the same basal states, under the condition and
    under the reference, and

    .. math:: \mathrm{lfc}_g = \log_2 \frac{\bar s_g(\mathrm{condition}) + c}
       {\bar s_g(\mathrm{reference}) + c}

    with :math:`\bar s_g` the mean over cells of the expected counts per 10,000. A gene counts as
    differentially expressed in a draw if :math:`|\mathrm{lfc}| \ge \delta`; genes are called in
    the order of the probability of that, as long as the expected share of false calls is at most
    `fdr` (Boyeau et al., PNAS 120, e2209124120, 2023; scvi-tools' mode ``"change"``). Draws differ
    by what is uncertain about the perturbations alone: the decoder is taken as known.
    ``model.differential_expression``, which scvi-tools brings, compares groups of cells that were
    measured.

    Parameters
    ----------
    model
        A trained model whose perturbations have a posterior.
    conditions
        As in :meth:`SAMSVAE.predict`; all single perturbations by default.
    reference
        The condition that they are compared with; no perturbation by default.
    delta
        Absolute log2 fold change that is worth calling.
    fdr
        Expected false discovery rate of the calls of a condition.
    n_samples
        Draws of masks and effects.
    credible_level
        Level of the interval.
    pseudocount
        Added to counts per 10,000, so that genes that are hardly seen do not lead the table.
    counterfactual
        The cells, from :meth:`SAMSVAE.counterfactual`; 200 basal states from the prior by default.
    context
        Context of cells and effects, as in :meth:`SAMSVAE.predict`, in place of `counterfactual`,
        which may have one of its own.

    Returns
    -------
    pandas.DataFrame
        A row for each condition and gene, with the genes in the index, by falling ``proba_de``
        within a condition. Columns as in scvi-tools: ``comparison``, ``group1`` (condition),
        ``group2`` (reference), ``proba_de``, ``proba_not_de``, ``bayes_factor`` (natural logarithm
        of their ratio), ``scale1`` and ``scale2`` (expected counts per 10,000), ``delta``,
        ``lfc_mean``, ``lfc_median``, ``lfc_std``, ``lfc_min``, ``lfc_max`` and
        ``is_de_fdr_<fdr>``, and besides ``lfc_lower`` and ``lfc_upper`` (interval), ``lfsr``
        (probability that the change is zero or of the other sign) and ``q_value`` (expected share
        of false calls, were the gene the last one called). For features that are no counts
        (``gene_likelihood="normal"``) ``lfc`` is the difference of the expected features.

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
    >>> table = scvi_sams.tl.differential_expression(model, ["KLF1+CEBPA"])  # doctest: +SKIP
    >>> table.query("`is_de_fdr_0.05` and lfc_mean > 1")  # doctest: +SKIP
    """
    require_effects(model, "differential_expression")
    pseudocount = checked("pseudocount", pseudocount)
    # Refused before the work, not after it.
    differential_expression_table(np.zeros((1, 1)), ["gene"], delta, fdr, credible_level)
    if counterfactual is not None and context is not None:
        raise ScreenError(
            f"context={context!r} beside counterfactual: make the cells of that context, "
            f"model.counterfactual(context={context!r})."
        )
    cells = model.counterfactual(context=context) if counterfactual is None else counterfactual
    genes, is_count_model = model.get_var_names(), model.module.is_count_model
    tables = []
    for label, reference_label, *scales in compared_means(
        model, conditions, reference, n_samples, "mean", cells
    ):
        scale, against = (values.astype(np.float64) for values in scales)
        if is_count_model:
            lfc = np.log2(scale + pseudocount) - np.log2(against + pseudocount)
        else:
            lfc = scale - against
        table = differential_expression_table(lfc, genes, delta, fdr, credible_level)
        for place, (name, value) in enumerate(
            {
                "comparison": f"{label} vs {reference_label}",
                "group1": label,
                "group2": reference_label,
            }.items()
        ):
            table.insert(place, name, value)
        for place, (name, column) in enumerate(
            {"scale1": scale.mean(0), "scale2": against.mean(0), "delta": delta}.items()
        ):
            table.insert(6 + place, name, column)
        size = table["lfc_mean"].abs()
        order = np.lexsort((-size.to_numpy(), -table["proba_de"].to_numpy()))
        tables.append(table.iloc[order])
    found = pd.concat(tables)
    found.attrs = provenance(model, cells.seed) | {"n_samples": n_samples}
    return found
