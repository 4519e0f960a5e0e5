"""Gene sets, and their enrichment in programmes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.stats import false_discovery_control, hypergeom, norm, rankdata, tiecorrect

from scvi_sams._exceptions import ScreenError
from scvi_sams.data.tables import profile_frame

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from scvi_sams.data.tables import ProfileTable

__all__ = [
    "GeneSets",
    "MeasuredGeneSets",
    "gene_set_enrichment",
    "measured_gene_sets",
    "read_gene_sets",
]


GeneSets: TypeAlias = "Mapping[str, Iterable[str]] | str | Path"
"""Genes of each set by its name, or a GMT file of them."""


class MeasuredGeneSets(NamedTuple):
    """The part of gene sets that was measured."""

    names: list[str]
    """Name of each set."""
    membership: sp.csc_matrix
    """Whether each gene is in each set, genes x sets, 0 or 1."""


def read_gene_sets(path: str | Path) -> dict[str, list[str]]:
    r"""Read gene sets from a GMT file, as MSigDB and Enrichr give them.

    Parameters
    ----------
    path
        Text file with one set a line: its name, a description, its genes, separated by tabs.

    Returns
    -------
    Genes of each set by its name, each once, in the order of the file.

    Raises
    ------
    ScreenError
        If the file is not there, holds no set, a line is none, or two sets have the same name.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from scvi_sams.tl import read_gene_sets
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "hallmarks.gmt"
    ...     _ = path.write_text("INTERFERON\tfrom MSigDB\tSTAT1\tIRF1\n")
    ...     read_gene_sets(path)
    {'INTERFERON': ['STAT1', 'IRF1']}
    """
    path = Path(path)
    if not path.is_file():
        raise ScreenError(f"There is no file {str(path)!r} to read gene sets from.")
    sets: dict[str, list[str]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        name, *rest = (field.strip() for field in line.split("\t"))
        # Enrichr's files weigh some genes: "STAT1,0.5".
        genes = [gene.split(",")[0] for gene in rest[1:] if gene]
        if not name or not genes:
            raise ScreenError(
                f"Line {number} of {path.name} is no gene set: a name, a description and genes, "
                "separated by tabs, are needed."
            )
        if name in sets:
            raise ScreenError(f"{path.name} has the gene set {name!r} twice: keep one.")
        sets[name] = list(dict.fromkeys(genes))
    if not sets:
        raise ScreenError(f"{path.name} holds no gene set.")
    return sets


def measured_gene_sets(
    gene_sets: GeneSets, genes: Sequence[str], min_genes: int = 5, max_genes: int = 500
) -> MeasuredGeneSets:
    """Keep what was measured of gene sets, and the sets of which enough was.

    Parameters
    ----------
    gene_sets
        Genes of each set, or a GMT file.
    genes
        Measured genes.
    min_genes, max_genes
        Measured genes that a set must have.

    Returns
    -------
    Names of the sets, and which of `genes` is in which.

    Raises
    ------
    ScreenError
        If no set is left, or genes repeat.
    ValueError
        If `min_genes` is below 1 or above `max_genes`.

    Examples
    --------
    >>> from scvi_sams.tl import measured_gene_sets
    >>> sets = {"INTERFERON": ["STAT1", "IRF1", "GBP1"], "RIBOSOME": ["RPL3"]}
    >>> measured = measured_gene_sets(sets, ["IRF1", "ACTB", "STAT1"], min_genes=2)
    >>> measured.names, measured.membership.toarray().ravel().tolist()
    (['INTERFERON'], [1.0, 0.0, 1.0])
    """
    if not 1 <= min_genes <= max_genes:
        raise ValueError(f"min_genes={min_genes}, max_genes={max_genes}: 1 <= min <= max needed.")
    row_of = {str(gene): row for row, gene in enumerate(genes)}
    if len(row_of) < len(genes):
        raise ScreenError("A gene is there twice: make the names of genes unique.")
    sets = gene_sets if isinstance(gene_sets, Mapping) else read_gene_sets(gene_sets)
    names, rows = [], []
    for name, members in sets.items():
        if isinstance(members, str):
            raise ScreenError(f"Gene set {name!r} is the text {members!r}: give a list of genes.")
        found = sorted({row_of[str(gene)] for gene in members if str(gene) in row_of})
        if min_genes <= len(found) <= max_genes:
            names.append(str(name))
            rows.append(found)
    if not names:
        raise ScreenError(
            f"None of {len(sets)} gene sets has {min_genes} to {max_genes} of the {len(genes)} "
            "measured genes: do both use the same kind of gene names?"
        )
    sizes = [len(found) for found in rows]
    indices = np.concatenate(rows)
    pointers = np.concatenate([[0], np.cumsum(sizes)])
    shape = (len(genes), len(names))
    return MeasuredGeneSets(
        names, sp.csc_matrix((np.ones(len(indices)), indices, pointers), shape=shape)
    )


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
    >>> from scvi_sams.tl import gene_set_enrichment
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
