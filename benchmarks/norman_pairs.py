"""Pairs of the Norman subset that were held out, beside the sum of the single effects.

Half of the controls are held out too. Against the controls that the singles were compared with,
the sum shares their noise with the truth, which looks like agreement: both are printed.
"""

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
from scvi_sams.evaluation import BASELINES, effect_agreement, observed_effects

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

_LABELS = {
    "perturbation_key": "perturbation",
    "control": "control",
    "size_factor_key": "total_umi_all_genes",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("--seed", type=int, default=0)
    arguments = arguments.parse_args(argv)
    prepare(arguments)
    screen = read_screen(arguments, "norman2019_subset.h5ad")
    labels = screen.obs["perturbation"].astype(str)
    measured = set(labels)
    pairs = sorted(
        label for label in measured if "+" in label and measured.issuperset(label.split("+"))
    )
    is_pair = labels.isin(pairs).to_numpy()
    controls = np.random.default_rng(arguments.seed).permutation(
        np.flatnonzero(labels == "control")
    )
    learned, held_out = np.split(controls, [len(controls) // 2])
    is_trained = ~is_pair
    is_trained[held_out] = False
    training = screen[is_trained].copy()
    scvi.settings.seed = arguments.seed
    SAMSVAE.setup_anndata(training, **_LABELS)
    model = SAMSVAE(training)
    watch = train(model)

    predicted = {
        "model": model.get_average_treatment_effect(pairs),
        "sum of singles": BASELINES["additive"](observed_effects(training, **_LABELS), pairs),
    }
    for title, of_truth in (("other controls", held_out), ("the same controls", learned)):
        scored = screen[np.sort(np.concatenate([np.flatnonzero(is_pair), of_truth]))]
        observed = observed_effects(scored, conditions=pairs, **_LABELS)
        scores = {name: effect_agreement(table, observed) for name, table in predicted.items()}
        rows = [
            {
                "pair": pair,
                **{
                    f"{what}, {name}": float(table.loc[pair, column])
                    for what, column in (
                        ("correlation", "pearson"),
                        ("squared error", "relative_squared_error"),
                    )
                    for name, table in scores.items()
                },
            }
            for pair in pairs
        ]
        print_table(
            f"Norman subset, five pairs held out, against {title} ({len(of_truth)})",
            with_mean(rows, "pair"),
            arguments,
        )
        shares = coverage(predicted["model"], observed)
        print("\n" + ", ".join(f"{name} {share:.3f}" for name, share in shares.items()))
    on = model.get_perturbation_mask() > 0.5
    print(
        f"\nperturbations with a mask: {int(on.any(axis=1).sum())} of {len(on)}; "
        f"background {float(model.history['background_scale'].iloc[-1, 0]):.3f}; "
        f"core seconds {watch.cpu:.1f}"
    )
