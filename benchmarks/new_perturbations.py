"""Perturbations added to a fitted model of the Papalexi screen, against a fit to all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scvi

from benchmarks._common import Stopwatch, parser, prepare, print_table, read_screen, with_mean
from scvi_sams import SAMSVAE

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

_SETUP = {
    "perturbation_key": "perturbation",
    "control": "control",
    "size_factor_key": "total_umi_all_genes",
}
# One of each kind: the shared mechanism, one of its own, overlapping, weak, without effect.
_ADDED = ("JAK2", "SMAD4", "IRF1", "CUL3", "ATF2")
_QUIET = {"train_size": 1.0, "accelerator": "cpu", "enable_progress_bar": False}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--added", nargs="+", default=list(_ADDED))
    arguments = arguments.parse_args(argv)
    prepare(arguments)
    screen = read_screen(arguments, "papalexi2021_eccite.h5ad")
    screen = screen[screen.obs["guide_frac"] > 0.5].copy()
    is_added = screen.obs["perturbation"].isin(arguments.added).to_numpy()
    rows, by_perturbation = [], []
    for seed in arguments.seeds:
        models, watches = {}, {}
        for name, cells in (("all", screen), ("known", screen[~is_added].copy())):
            scvi.settings.seed = seed
            SAMSVAE.setup_anndata(cells, **_SETUP)
            models[name] = SAMSVAE(cells)
            watches[name] = Stopwatch()
            with watches[name]():
                models[name].train(**_QUIET)
        watch = Stopwatch()
        with watch():
            query = SAMSVAE.load_query_data(
                screen[is_added].copy(), models["known"], new_perturbations=True
            )
            query.train()
        joint, added = (
            model.get_average_treatment_effect(arguments.added).to_df()
            for model in (models["all"], query)
        )
        masks = [
            model.get_perturbation_mask().loc[arguments.added].gt(0.5).any(axis=1)
            for model in (models["all"], query)
        ]
        correlation = {
            name: float(np.corrcoef(joint.loc[name], added.loc[name])[0, 1])
            for name in arguments.added
        }
        by_perturbation.append({"seed": seed} | correlation)
        rows.append(
            {
                "seed": seed,
                "correlation of all effects": float(
                    np.corrcoef(joint.to_numpy().ravel(), added.to_numpy().ravel())[0, 1]
                ),
                "masks agree (of 5)": int((masks[0] == masks[1]).sum()),
                "seconds to add": watch.wall,
                "core seconds to add": watch.cpu,
                "core seconds to fit all": watches["all"].cpu,
            }
        )
    print_table("New perturbations on a fitted model", with_mean(rows, "seed"), arguments)
    print_table("Correlation by perturbation", with_mean(by_perturbation, "seed"), arguments)
