"""The Norman screen on the splits of Bereket and Karaletsos (2023): pairs not or rarely seen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks._common import prepare
from benchmarks._paper import (
    LABELS,
    mean_and_spread,
    paper_parser,
    print_paper_table,
    run_rows,
    with_counts,
)
from benchmarks._paper_splits import (
    split_pairs_by_training_cells,
    split_pairs_out_of_distribution,
    training_genes,
)
from scvi_sams.datasets import public_screen

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

__all__ = ["main"]

_SPLITS = {
    "out-of-distribution": split_pairs_out_of_distribution,
    "data-efficiency": split_pairs_by_training_cells,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = paper_parser(__doc__, n_latent=200, mask_prior=0.01, steps=30_000)
    arguments.add_argument("--path", type=Path, help="scPerturb's file; else it is downloaded")
    arguments.add_argument("--split", default="out-of-distribution", choices=list(_SPLITS))
    arguments.add_argument(
        "--fractions", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0]
    )
    arguments.add_argument("--n-genes", type=int, default=5_000)
    arguments = arguments.parse_args(argv)
    prepare(arguments)
    screen = public_screen("norman_2019", arguments.path)
    del screen.layers["counts"]  # X has them
    screen = with_counts(screen)
    runs = []
    for seed in arguments.seeds:
        for fraction in arguments.fractions:
            adata = _split(screen, arguments.split, fraction, seed, arguments.n_genes)
            runs += [
                {"fraction": fraction, "seed": seed} | row
                for row in run_rows(adata, seed, arguments)
            ]
    print_paper_table(
        f"Norman, {arguments.split}, {len(arguments.seeds)} seeds",
        mean_and_spread(runs, ["fraction", "model"]),
        {},
        arguments,
    )


def _split(screen: AnnData, split: str, fraction: float, seed: int, n_genes: int) -> AnnData:
    """Cells of the split, and the genes that vary most in its training cells."""
    _SPLITS[split](screen, **LABELS, training_fraction=fraction, seed=seed)
    used = (screen.obs["split"] != "unused").to_numpy()
    return with_counts(screen[used, training_genes(screen, n_genes)])


if __name__ == "__main__":
    main()
