"""Scorecards: SAMSVAE and CPAVAE beside the baselines, on real screens and a simulated one."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import scvi

from benchmarks._common import Stopwatch, parser, prepare, print_table, read_screen, train
from scvi_sams import CPAVAE, SAMSVAE
from scvi_sams.datasets import benchmark_screen, simulated_screen
from scvi_sams.evaluation import scorecard, split_cells, split_indices, split_pairs

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    import anndata as ad
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["main"]

_LABELS = {"perturbation_key": "perturbation", "control": "control"}
_ALL_PAIRS = {"n_seen": 2, "held_out": 1.0, "validation_size": 0.0}
_PANEL = _LABELS | {"size_factor_key": "total_umi_all_genes"}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("screen", choices=[*_SCREENS, "speed"])
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--max-epochs", type=int)
    arguments.add_argument("--output", type=Path, help="folder for the tables of the scorecard")
    arguments = arguments.parse_args(argv)
    prepare(arguments)
    if arguments.screen == "speed":
        _speed(arguments)
    else:
        _compare(arguments)


def _papalexi(arguments: argparse.Namespace) -> tuple[ad.AnnData, list[NDArray[np.int64]]]:
    """Cells held out at random, 64/16/20."""
    adata = read_screen(arguments, "papalexi2021_eccite.h5ad")
    adata = adata[adata.obs["guide_frac"] > 0.5].copy()
    split_cells(adata, seed=arguments.seed)
    return adata, split_indices(adata)


def _norman(arguments: argparse.Namespace) -> tuple[ad.AnnData, list[NDArray[np.int64]]]:
    """The five pairs held out of which both parts were measured alone, and half the controls."""
    adata = read_screen(arguments, "norman2019_subset.h5ad")
    split_pairs(adata, **_LABELS, **_ALL_PAIRS, test_controls=0.5, seed=arguments.seed)
    return adata, split_indices(adata)


def _simulated(arguments: argparse.Namespace) -> tuple[ad.AnnData, list[NDArray[np.int64]]]:
    """All sixty pairs held out, and a fifth of the controls."""
    adata = benchmark_screen("default", seed=arguments.seed)
    split_pairs(adata, **_LABELS, **_ALL_PAIRS, seed=arguments.seed)
    return adata, split_indices(adata)


_SCREENS = {
    "papalexi": (_papalexi, _PANEL | {"batch_key": "bio_rep"}),
    "norman": (_norman, _PANEL),
    "simulated": (_simulated, _LABELS | {"layer": "counts"}),
}


def _compare(arguments: argparse.Namespace) -> None:
    read, setup = _SCREENS[arguments.screen]
    adata, split = read(arguments)
    models, seconds = {}, {}
    for model_class in (SAMSVAE, CPAVAE):
        scvi.settings.seed = arguments.seed
        model_class.setup_anndata(own := adata.copy(), **setup)
        model = model_class(own)
        parts = {"external_indexing": split}
        watch = train(model, None, max_epochs=arguments.max_epochs, datasplitter_kwargs=parts)
        models[model_class.__name__], seconds[model_class.__name__] = model, watch.cpu
    watch = Stopwatch()
    with watch():
        card = scorecard(models, seed=arguments.seed)
    print(f"\n### Scorecard: {arguments.screen}. {read.__doc__}\n")
    print(card.to_markdown())
    if (card.per_condition["stratum"] != "all").any():
        strata = card.by_stratum[["pearson", "relative_squared_error"]].reset_index()
        print_table("By size of the observed effect", strata.to_dict("records"), arguments)
    trained = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    print(f"\ncore seconds: training {trained}; scorecard of both {watch.cpu:.0f}")
    if arguments.output:
        card.to_csv(arguments.output)


def _speed(arguments: argparse.Namespace) -> None:
    """20,000 cells x 1,000 genes x 200 conditions, a fifth held out; the model hardly trained."""
    adata = simulated_screen(
        20_000, 1_000, n_perturbations=200, n_pairs=0, n_latent=20, seed=arguments.seed
    )
    split_cells(adata, validation_size=0.0, seed=arguments.seed)
    SAMSVAE.setup_anndata(adata, layer="counts", **_LABELS)
    model = SAMSVAE(adata)
    parts = {"external_indexing": split_indices(adata)}
    train(model, None, max_epochs=arguments.max_epochs or 1, datasplitter_kwargs=parts)
    rows = []
    for step, run in (
        ("scorecard without cells", lambda: scorecard(model, cell_level=False)),
        ("scorecard", lambda: scorecard(model)),
        (
            "get_iwelbo, 100 particles, 4,000 cells",
            lambda: model.get_iwelbo(indices=model.test_indices, n_particles=100),
        ),
    ):
        watch = Stopwatch()
        with watch():
            run()
        rows.append(
            {
                "step": step,
                "seconds": watch.wall,
                "core seconds": watch.cpu,
                "peak memory so far, MB": _peak_memory(),
            }
        )
    print_table("20,000 cells x 1,000 genes x 200 conditions", rows, arguments, digits=1)


def _peak_memory() -> float:
    bytes_per_unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * bytes_per_unit / 1e6
