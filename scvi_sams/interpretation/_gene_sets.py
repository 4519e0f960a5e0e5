"""Gene sets, as users have them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import scipy.sparse as sp

from scvi_sams._exceptions import ScreenError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["GeneSets", "MeasuredGeneSets", "measured_gene_sets", "read_gene_sets"]

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
    >>> from scvi_sams.interpretation import read_gene_sets
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
    >>> from scvi_sams.interpretation import measured_gene_sets
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
