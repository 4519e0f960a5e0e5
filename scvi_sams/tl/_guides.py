"""Guides: how often they work, and whether those of a target do the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scvi_sams._arguments import checked
from scvi_sams.model.efficacy import guide_table
from scvi_sams.model.read_outs import check_level

if TYPE_CHECKING:
    import pandas as pd

    from scvi_sams.model import SAMSVAE


def guides(
    model: SAMSVAE,
    fdr: float = 0.05,
    credible_level: float = 0.95,
    *,
    own_gene: bool = True,
) -> pd.DataFrame:
    """Efficacy of each guide, and whether it agrees with the other guides of its target.

    The efficacy is the share of a guide's training cells in which the perturbation took. Where
    the cells cannot tell it (the effect is weak, or there are few cells), its posterior is near
    what guides have in general, the interval is wide, and ``can_be_told`` is false: then claim
    nothing.

    Guides that differ in efficacy alone shift cells in one direction. Whether a guide's mean
    latent shift points elsewhere than that of the other guides of its target is tested, whatever
    the lengths: if so, one of them has effects off its target.

    Parameters
    ----------
    model
        A trained model; set up with ``guide_key``, else each perturbation is its own guide.
    fdr
        False discovery rate (Benjamini and Hochberg) at which guides are flagged.
    credible_level
        Level of the intervals.
    own_gene
        As in ``SAMSVAE.get_perturbed_probability``.

    Returns
    -------
    pandas.DataFrame
        A row for each guide:

        * ``target``, ``n_cells``: perturbation, and training cells with the guide
        * ``efficacy``, ``efficacy_lower``, ``efficacy_upper``: posterior mean and interval
        * ``can_be_told``: whether the interval is less than half as wide as that of the prior
        * ``effect_where_it_took``: length of the shift of the target, in standard deviations of
          the basal state; as labelled where no guide of the target can be told
        * ``similarity``: cosine of the guide's mean shift and that of the other guides of its
          target, in units of the variation among controls; noise draws it to zero
        * ``p_value``, ``q_value``, ``off_target``: of the test of their directions, NaN and false
          where the target has one guide

    Raises
    ------
    NotImplementedError
        If what counts say of a shift has no closed form in this model.
    ScreenError
        If efficacies are still to be solved and the model has no AnnData, or ``fdr`` is no rate.

    Examples
    --------
    >>> table = scvi_sams.tl.guides(model)  # doctest: +SKIP
    >>> table.query("can_be_told and efficacy_upper < 0.5")  # doctest: +SKIP
    """
    fdr, own_gene = checked("fdr", fdr), checked("own_gene", own_gene)
    check_level(credible_level)
    table = guide_table(model, credible_level, own_gene)
    table["off_target"] = (table["q_value"] < fdr).to_numpy(bool)
    return table
