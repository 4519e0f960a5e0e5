"""Pairs of the Norman subset that were held out, beside the sum of the single effects."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scvi

from benchmarks._common import Stopwatch, parser, prepare, print_table, read_screen, with_mean
from scvi_sams import SAMSVAE
from scvi_sams.evaluation import effect_correlation_by_condition, observed_average_treatment_effect

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
    training = screen[~labels.isin(pairs)].copy()
    scvi.settings.seed = arguments.seed
    SAMSVAE.setup_anndata(training, **_LABELS)
    model = SAMSVAE(training)
    watch = Stopwatch()
    with watch():
        model.train(train_size=1.0, accelerator="cpu", enable_progress_bar=False)

    predicted = model.get_average_treatment_effect(pairs)
    observed = observed_average_treatment_effect(screen, conditions=pairs, **_LABELS)
    singles = observed_average_treatment_effect(training, **_LABELS).to_df()
    additive = predicted.copy()
    additive.X = np.stack([singles.loc[pair.split("+")].sum().to_numpy() for pair in pairs])
    rows = [
        {
            "pair": pair,
            "correlation, model": float(model_score["pearson"]),
            "correlation, sum of singles": float(sum_score["pearson"]),
            "squared error, model": float(model_score["relative_squared_error"]),
            "squared error, sum of singles": float(sum_score["relative_squared_error"]),
        }
        for pair, (_, model_score), (_, sum_score) in zip(
            pairs,
            effect_correlation_by_condition(predicted, observed).iterrows(),
            effect_correlation_by_condition(additive, observed).iterrows(),
            strict=True,
        )
    ]
    on = model.get_perturbation_mask() > 0.5
    print_table("Norman subset, five pairs held out", with_mean(rows, "pair"), arguments)
    print(
        f"\nperturbations with a mask: {int(on.any(axis=1).sum())} of {len(on)}; "
        f"background {float(model.history['spike_scale'].iloc[-1, 0]):.3f}; "
        f"core seconds {watch.cpu:.1f}"
    )
