"""Which gene sets a gene programme is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, hypergeom, norm, rankdata, tiecorrect

from scvi_sams._exceptions import ScreenError
from scvi_sams.interpretation._gene_sets import measured_gene_sets
from scvi_sams.metrics._profiles import profile_frame

if TYPE_CHECKING:
    import scipy.sparse as sp
    from numpy.typing import NDArray

    from scvi_sams.interpretation._gene_sets import GeneSets, MeasuredGeneSets
    from scvi_sams.metrics._profiles import ProfileTable

__all__ = ["gene_set_enrichment"]


def gene_set_enrichment(
    programs: ProfileTable,
    gene_sets: GeneSets,
    test: Literal["rank", "hypergeometric"] = "rank",
    *,
    n_top_genes: int = 50,
    min_genes: int = 5,
    max_genes: int = 500,
) -> pd.DataFrame:
    """Gene sets that go up or down in gene programmes, against all measured genes.

    Parameters
    ----------
    programs
        Programmes x genes, signed: from ``model.get_gene_programs()``, or any effects, such as
        ``model.get_average_treatment_effect()``.
    gene_sets
        Genes of each set by its name, or a GMT file (:func:`read_gene_sets`).
    test
        ``"rank"``: Wilcoxon's rank-sum test of the genes of the set against all others, two-sided.
        ``"hypergeometric"``: overlap with the genes that go up most, and with those that go down
        most, one-sided (Fisher's exact test).
    n_top_genes
        Genes of each direction for the hypergeometric test. Genes that do not go in the direction
        are left out.
    min_genes, max_genes
        Measured genes that a set must have to be tested.

    Returns
    -------
    A row for each programme, gene set and, for the hypergeometric test, direction, by falling
    evidence within a programme:

    * ``program``, ``gene_set``, ``direction`` (``"up"`` or ``"down"``), ``n_genes`` (measured
      genes of the set)
    * ``score``: z-score of the rank-sum test, positive if the set goes up; for the hypergeometric
      test the overlap over its expectation
    * ``p_value``, ``q_value`` (Benjamini and Hochberg over all rows)
    * ``genes``: genes of the set that go in the direction, strongest first, joined by commas, at
      most 20; for the hypergeometric test those of the overlap, whose number is ``n_overlap``

    Raises
    ------
    ScreenError
        If no gene set has enough measured genes, or a programme holds NaN.
    ValueError
        If `test` is unknown or a number is out of its range.

    Notes
    -----
    The background is the measured genes, as only they could be found. Both tests take genes as
    independent. Genes of a set are correlated, so that p-values are too small (Goeman and
    Buhlmann, Bioinformatics 2007): take the order seriously and the level with care.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> from scvi_sams.interpretation import gene_set_enrichment
    >>> genes = [f"G{i}" for i in range(100)]
    >>> effect = pd.DataFrame([np.linspace(3, -3, 100)], index=["latent_0"], columns=genes)
    >>> table = gene_set_enrichment(effect, {"TOP": genes[:10], "MIXED": genes[::9]})
    >>> table.loc[0, ["gene_set", "direction"]].tolist()
    ['TOP', 'up']
    """
    if test not in {"rank", "hypergeometric"}:
        raise ValueError(f"test={test!r} is unknown; use 'rank' or 'hypergeometric'.")
    if n_top_genes < 1:
        raise ValueError(f"n_top_genes={n_top_genes}: at least one is needed.")
    frame = profile_frame(programs, "programs")
    effects = frame.to_numpy()
    if not np.isfinite(effects).all():
        row = int(np.argmin(np.isfinite(effects).all(axis=1)))
        raise ScreenError(f"Programme {frame.index[row]!r} holds values that are not finite.")
    sets = measured_gene_sets(gene_sets, list(frame.columns), min_genes, max_genes)
    if test == "rank":
        table = _rank_table(frame, sets)
    else:
        table = _overlap_table(frame, sets, n_top_genes)
    table.insert(
        table.columns.get_loc("p_value") + 1, "q_value", false_discovery_control(table["p_value"])
    )
    rank_of = {name: row for row, name in enumerate(frame.index)}
    table["_program"] = table["program"].map(rank_of)
    table["_strength"] = -table["score"].abs()
    table = table.sort_values(["_program", "p_value", "_strength"], kind="stable")
    return table.drop(columns=["_program", "_strength"]).reset_index(drop=True)


def rank_sum_z_scores(
    effects: NDArray[np.float64], membership: sp.csc_matrix
) -> NDArray[np.float64]:
    """Z-scores of Wilcoxon's rank-sum test, programmes x sets, ties accounted for."""
    n_genes = effects.shape[1]
    ranks = rankdata(effects, axis=1)
    size = np.asarray(membership.sum(axis=0)).ravel()
    rank_sum = np.asarray((membership.T @ ranks.T).T)
    statistic = rank_sum - size * (n_genes + 1) / 2
    ties = np.array([tiecorrect(row) for row in ranks])[:, None]
    spread = np.sqrt(ties * size * (n_genes - size) * (n_genes + 1) / 12)
    z = np.divide(statistic, spread, out=np.zeros_like(statistic), where=spread > 0)
    return np.asarray(z)


def _rank_table(frame: pd.DataFrame, sets: MeasuredGeneSets) -> pd.DataFrame:
    z = rank_sum_z_scores(frame.to_numpy(), sets.membership)
    table = _rows(frame.index, sets)
    table["direction"] = np.where(z.ravel() >= 0, "up", "down")
    table["score"] = z.ravel()
    table["p_value"] = np.minimum(2 * norm.sf(np.abs(z.ravel())), 1)
    sign = np.where(z >= 0, 1.0, -1.0)
    genes = frame.columns.to_numpy(object)
    leading = []
    for row, effect in enumerate(frame.to_numpy()):
        for column in range(len(sets.names)):
            leading.append(_leading(sign[row, column] * effect, _members(sets, column), genes))
    table["genes"] = leading
    return table


def _overlap_table(frame: pd.DataFrame, sets: MeasuredGeneSets, n_top: int) -> pd.DataFrame:
    genes = frame.columns.to_numpy(object)
    n_genes = len(genes)
    size = np.asarray(sets.membership.sum(axis=0)).ravel()
    tables = []
    for direction, sign in (("up", 1.0), ("down", -1.0)):
        signed = sign * frame.to_numpy()
        order = np.argsort(-signed, axis=1, kind="stable")[:, :n_top]
        chosen = np.zeros(signed.shape)
        np.put_along_axis(chosen, order, 1.0, axis=1)
        chosen *= signed > 0
        overlap = np.asarray((sets.membership.T @ chosen.T).T)
        n_chosen = chosen.sum(axis=1, keepdims=True)
        expected = n_chosen * size / n_genes
        table = _rows(frame.index, sets)
        table["direction"] = direction
        table["n_overlap"] = overlap.ravel().astype(int)
        table["score"] = np.divide(
            overlap, expected, out=np.zeros_like(overlap), where=expected > 0
        ).ravel()
        table["p_value"] = hypergeom.sf(overlap - 1, n_genes, size, n_chosen).ravel().clip(0, 1)
        table["genes"] = [
            _leading(np.where(chosen[row] > 0, signed[row], 0), _members(sets, column), genes)
            for row in range(len(frame))
            for column in range(len(sets.names))
        ]
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _rows(programs: pd.Index, sets: MeasuredGeneSets) -> pd.DataFrame:
    """Every pair of a programme and a set."""
    size = np.asarray(sets.membership.sum(axis=0)).ravel().astype(int)
    return pd.DataFrame(
        {
            "program": np.repeat(programs.to_numpy(object), len(sets.names)),
            "gene_set": np.tile(np.array(sets.names, object), len(programs)),
            "n_genes": np.tile(size, len(programs)),
        }
    )


def _members(sets: MeasuredGeneSets, column: int) -> NDArray[np.int32]:
    pointers = sets.membership.indptr
    return np.asarray(sets.membership.indices[pointers[column] : pointers[column + 1]])


def _leading(
    signed: NDArray[np.float64], members: NDArray[np.int32], genes: NDArray[np.object_]
) -> str:
    """Members that go up, the strongest first."""
    up = members[signed[members] > 0]
    strongest = up[np.argsort(-signed[up], kind="stable")][:20]
    return ",".join(genes[strongest])
