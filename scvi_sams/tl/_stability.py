"""Whether another fit finds the same mechanisms."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scvi_sams._exceptions import ScreenError
from scvi_sams.tl.latent_matching import matched_correlation, paired

if TYPE_CHECKING:
    from collections.abc import Sequence


def match_latents(reference: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    r"""Find the latents of another fit that do what those of a reference do.

    One to one, so that the sum of absolute Pearson correlations of the columns is largest
    (Hungarian method). Columns are whatever describes the latents: effects of perturbations
    (``model.get_perturbation_effect()``), inclusion probabilities, or effects on genes
    (genes x latents).

    Parameters
    ----------
    reference, other
        Perturbations or genes x latents, with the same rows in any order.

    Returns
    -------
    pandas.DataFrame
        A row a matched latent of the reference, in its order: ``other_latent``, ``correlation``
        (absolute; 0 for a latent that does nothing) and ``sign`` (-1 where the other one points
        the other way, 0 without correlation).

    Raises
    ------
    ScreenError
        If the rows differ, or values are not finite.

    Examples
    --------
    >>> import pandas as pd
    >>> from scvi_sams.tl import match_latents
    >>> a = pd.DataFrame({"latent_0": [1.0, 0, 0], "latent_1": [0.0, 1, 2]}, index=list("ABC"))
    >>> b = pd.DataFrame({"latent_0": [0.0, -1, -2], "latent_1": [2.0, 0, 0]}, index=list("ABC"))
    >>> match_latents(a, b).round(3).to_dict("list")
    {'other_latent': ['latent_1', 'latent_0'], 'correlation': [1.0, 1.0], 'sign': [1, -1]}
    """
    first, second = paired(reference, other)
    rows, columns, correlation, _ = matched_correlation(first, second)
    first, second = first[:, rows], second[:, columns]
    centred = (first - first.mean(0)) * (second - second.mean(0))
    return pd.DataFrame(
        {
            "other_latent": other.columns[columns],
            "correlation": correlation,
            "sign": np.where(correlation > 0, np.sign(centred.sum(0)), 0).astype(int),
        },
        index=pd.Index(reference.columns[rows], name="latent"),
    )


def mechanism_stability(
    tables: Sequence[pd.DataFrame], latent_effects: Sequence[pd.DataFrame] | None = None
) -> pd.DataFrame:
    """How often other fits make the calls of the first one, sign included.

    Latents of each other fit are matched with those of the first by :func:`match_latents`.

    Parameters
    ----------
    tables
        Mechanisms of fits with different seeds, from :func:`mechanisms`; the first is the one to
        judge.
    latent_effects
        What to match latents by, rows x latents, one for each fit, such as effects on genes. By
        default the ``effect_mean`` of the tables.

    Returns
    -------
    pandas.DataFrame
        A row for each called entry of the first fit: ``perturbation``, ``latent``,
        ``share_called`` (of the other fits, those that call the matched latent with the same
        sign), ``latent_correlation`` (mean over the other fits, absolute, of the matched latents)
        and ``share_perturbation_called`` (of the other fits, those that call the perturbation on
        any latent). The mean of ``share_called`` over the calls is in ``attrs["agreement"]``.

    Raises
    ------
    ScreenError
        If there is no other fit, or the fits have other perturbations.
    ValueError
        If the number of ``latent_effects`` is not that of the fits.

    Examples
    --------
    >>> tables = [scvi_sams.tl.mechanisms(fit(seed)) for seed in range(3)]  # doctest: +SKIP
    >>> scvi_sams.tl.mechanism_stability(tables).attrs["agreement"]  # doctest: +SKIP
    """
    if len(tables) < 2:
        raise ScreenError("Stability needs the mechanisms of at least one other fit.")
    reference = tables[0]
    effects = [_wide(table, "effect_mean") for table in tables]
    described_by = effects if latent_effects is None else list(latent_effects)
    if len(described_by) != len(tables):
        raise ValueError(
            f"latent_effects holds {len(described_by)} tables for {len(tables)} fits: give one "
            "for each, in their order."
        )
    called = [_wide(table, "called") for table in tables]
    result = reference.loc[reference["called"], ["perturbation", "latent"]].reset_index(drop=True)
    rows = effects[0].index.get_indexer(result["perturbation"])
    columns = effects[0].columns.get_indexer(result["latent"])
    again, any_again, correlations = [], [], []
    for k in range(1, len(tables)):
        if missing := list(effects[0].index.symmetric_difference(effects[k].index)):
            raise ScreenError(
                f"{missing[0]!r} is in one fit only: compare fits of the same perturbations."
            )
        match = match_latents(described_by[0], described_by[k]).reindex(effects[0].columns)
        sign, correlation = match["sign"].fillna(0), match["correlation"].fillna(0.0)
        # A latent without a match, of sign 0, has no counterpart that could be called.
        of_match = effects[k].columns.get_indexer(match["other_latent"])
        other_called = called[k].loc[effects[0].index].to_numpy(bool)[:, of_match]
        other_sign = np.sign(effects[k].loc[effects[0].index].to_numpy())[:, of_match]
        same_sign = other_sign * sign.to_numpy() == np.sign(effects[0].to_numpy())
        again.append((other_called & same_sign & (sign.to_numpy() != 0))[rows, columns])
        any_again.append(called[k].loc[effects[0].index].any(axis=1).to_numpy()[rows])
        correlations.append(correlation.to_numpy()[columns])
    result["share_called"] = np.mean(again, axis=0)
    result["latent_correlation"] = np.mean(correlations, axis=0)
    result["share_perturbation_called"] = np.mean(any_again, axis=0)
    result.attrs["agreement"] = float(result["share_called"].mean())
    return result


def _wide(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """A column of a tidy table as perturbations x latents, in the order of the table."""
    wide = table.pivot(index="perturbation", columns="latent", values=column)
    return wide.loc[pd.unique(table["perturbation"]), pd.unique(table["latent"])]
