"""Effects fitted on one half of the Papalexi cells, against those observed in the other half."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scvi

from benchmarks._common import (
    coverage,
    parser,
    prepare,
    print_table,
    read_screen,
    train,
    with_mean,
)
from scvi_sams import SAMSVAE
from scvi_sams.evaluation import effect_agreement, effect_correlation, observed_effects

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

_OBSERVED = {
    "perturbation_key": "perturbation",
    "control": "control",
    "size_factor_key": "total_umi_all_genes",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("--splits", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    arguments.add_argument("--seed", type=int, help="seed of training (default: the split)")
    arguments.add_argument("--max-epochs", type=int)
    arguments.add_argument(
        "--train-size", type=float, default=1.0, help="below 1: the rest is for validation"
    )
    arguments.add_argument("--batch-key", help="column of the batches, none by default")
    arguments = arguments.parse_args(argv)
    prepare(arguments)
    screen = read_screen(arguments, "papalexi2021_eccite.h5ad")
    screen = screen[screen.obs["guide_frac"] > 0.5].copy()
    rows = []
    for split in arguments.splits:
        order = np.random.default_rng(split).permutation(screen.n_obs)
        half = screen.n_obs // 2
        first, second = (screen[np.sort(part)].copy() for part in (order[:half], order[half:]))
        scvi.settings.seed = split if arguments.seed is None else arguments.seed
        SAMSVAE.setup_anndata(first, batch_key=arguments.batch_key, **_OBSERVED)
        model = SAMSVAE(first)
        watch = train(model, arguments.train_size, max_epochs=arguments.max_epochs)
        predicted = model.get_average_treatment_effect()
        raw = observed_effects(first, **_OBSERVED)
        held_out = observed_effects(second, **_OBSERVED)
        error, raw_error = (
            effect_agreement(effects, held_out, pooled=True)["relative_squared_error"].item()
            for effects in (predicted, raw)
        )
        rows.append(
            {
                "split": split,
                "correlation, model": effect_correlation(predicted, held_out),
                "correlation, raw": effect_correlation(raw, held_out),
                "squared error, model": error,
                "squared error, raw": raw_error,
                "ratio of errors": error / raw_error,
                **coverage(predicted, held_out),
                "noise absorbed": float(model.module.gene_effects.absorbed),
                "core seconds": watch.cpu,
            }
        )
    print_table("Papalexi, random halves", with_mean(rows, "split"), arguments)
