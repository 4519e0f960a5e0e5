"""Whether intervals of pairs that were never measured hold the truth as often as they claim."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
import scvi

from benchmarks._common import parser, prepare, print_table, train
from scvi_sams import SAMSVAE
from scvi_sams.datasets import simulated_screen
from scvi_sams.evaluation import (
    interaction_residuals,
    interval_coverage,
    observed_effects,
)
from scvi_sams.tl import classify_pairs, pair_interactions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

__all__ = ["main"]

_LABELS = {"perturbation_key": "perturbation", "control": "control", "layer": "counts"}
_SCREEN: dict[str, Any] = {
    "n_genes": 200,
    "n_perturbations": 15,
    "n_pairs": 45,
    "n_latent": 5,
    "mask_probability": 0.2,
    "library_size": 4_000.0,
    "n_batches": 1,
    "pair_fraction": 0.5,
}
_LEVELS = (0.5, 0.8, 0.95)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    arguments.add_argument("--cells", type=int, default=5_000, help="cells of the screen, made")
    arguments.add_argument("--truth-cells", type=int, default=60_000)
    arguments.add_argument("--measured", type=int, default=20, help="pairs to train on, of 45")
    arguments.add_argument("--samples", type=int, default=50, help="draws of masks and effects")
    arguments.add_argument("--max-epochs", type=int, default=60)
    arguments = arguments.parse_args(argv)
    prepare(arguments)
    runs = [_run(seed, arguments) for seed in arguments.seeds]
    print_table("Training, a row a screen", [summary for summary, _ in runs], arguments)
    rows = pd.DataFrame([row for _, coverage in runs for row in coverage])
    means = rows.groupby(["intervals", "nominal"], sort=False).mean().reset_index()
    means["seed"] = "mean"
    rows = pd.concat([rows, means[rows.columns]], ignore_index=True)
    title = f"Share of true values in intervals of unmeasured pairs, {len(runs)} screens"
    print_table(title, rows.to_dict("records"), arguments)


def _run(seed: int, arguments: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    screen = simulated_screen(n_cells=arguments.cells, seed=seed, **_SCREEN)
    pairs = [name for name in screen.obs["perturbation"].cat.categories if "+" in name]
    unmeasured = pairs[arguments.measured :]
    screen = screen[~screen.obs["perturbation"].isin(unmeasured)].copy()
    SAMSVAE.setup_anndata(screen, **_LABELS)
    scvi.settings.seed = seed
    model = SAMSVAE(screen, n_latent=10, n_hidden=100)
    train(model, max_epochs=arguments.max_epochs)
    truth = _true_effects(seed, arguments.truth_cells)
    deviation = interaction_residuals(truth, unmeasured)
    score = classify_pairs(truth, unmeasured)["interaction_score"]
    coverage = []
    for name, calibration in (("masks and effects", None), ("calibrated", "measured")):
        for level in _LEVELS:
            found = pair_interactions(
                model,
                unmeasured,
                arguments.samples,
                level,
                calibration=calibration,
                counterfactual=model.counterfactual(n_cells=100, seed=seed),
            )
            obs = found.obs
            lower, upper = obs["interaction_score_lower"], obs["interaction_score_upper"]
            coverage.append(
                {
                    "seed": seed,
                    "intervals": name,
                    "nominal": level,
                    "deviation of genes": interval_coverage(found, deviation).mean(),
                    "interaction score": score.between(lower, upper).mean(),
                    "width of the score's": (upper - lower).mean(),
                }
            )
    error = obs["interaction_score"] - score
    return {
        "seed": seed,
        "unmeasured pairs": len(unmeasured),
        "measured pairs used": found.uns["scvi_sams"]["n_calibration_pairs"],
        "correlation of scores": obs["interaction_score"].corr(score),
        "score error, root mean square": float((error**2).mean() ** 0.5),
        "rank correlation of surprise": obs["surprise"].corr(
            (deviation.to_df() ** 2).sum(axis=1), method="spearman"
        ),
    }, coverage


def _true_effects(seed: int, n_cells: int) -> AnnData:
    """Effects in so many cells of the same truth that their noise is small."""
    cells = simulated_screen(n_cells=n_cells, seed=seed, **_SCREEN)
    return observed_effects(cells, **_LABELS)


if __name__ == "__main__":
    main()
