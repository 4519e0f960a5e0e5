"""Effects of perturbations without cells, from informative and useless embeddings.

A quarter of the perturbations of a simulated screen, and all pairs, lose their cells. Informative
embeddings are linear in the true shifts of latents, with noise; useless ones are noise alone.
Errors and coverage are of the exact effects. "observed" takes the effects of the measured
perturbations from cells, "model" from a fit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scvi

from benchmarks._common import Stopwatch, parser, prepare, print_table
from benchmarks._single_genes import VARIANTS, single_gene_screen
from scvi_sams import SAMSVAE
from scvi_sams.evaluation import BASELINES, observed_effects
from scvi_sams.tl import predict_unseen

if TYPE_CHECKING:
    from collections.abc import Sequence

    import anndata as ad

__all__ = ["main"]

_LABELS = {"perturbation_key": "perturbation", "control": "control"}
_LEVELS = (0.5, 0.8, 0.95)
_N_FEATURES = 64
_NOISE = {"informative": 0.5, "weak": 2.0, "useless": np.inf}  # to the root mean square of signal


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("--variants", nargs="+", default=["default"], choices=VARIANTS)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--cells", type=int, default=12_000)
    arguments.add_argument("--no-model", action="store_true", help="observed effects alone")
    arguments = arguments.parse_args(argv)
    prepare(arguments)
    for variant in arguments.variants:
        rows = []
        for seed in arguments.seeds:
            rows += _run(variant, seed, arguments.cells, not arguments.no_model)
        table = pd.DataFrame(rows)
        means = table.groupby(["effects", "embedding"], sort=False).mean().reset_index()
        means["seed"] = "mean"
        both = pd.concat([table, means[table.columns]], ignore_index=True)
        print_table(f"Unseen perturbations, {variant}", both.to_dict("records"), arguments)


def _run(variant: str, seed: int, n_cells: int, with_model: bool) -> list[dict[str, object]]:
    screen, truth = single_gene_screen(variant, seed, n_cells)
    names = [name for name in truth.index if "+" not in name]
    rng = np.random.default_rng(seed)
    unseen = sorted(rng.permutation(names)[: len(names) // 4])
    measured = [name for name in names if name not in unseen]
    cells = screen[screen.obs["perturbation"].isin(["control", *measured])].copy()
    signal = screen.uns["shift"] @ rng.normal(size=(screen.uns["shift"].shape[1], _N_FEATURES))
    signal /= np.sqrt(np.mean(signal**2))
    noise = rng.normal(size=signal.shape)
    observed = observed_effects(cells, **_LABELS)
    sources: dict[str, ad.AnnData] = {"observed": observed}
    if with_model:
        scvi.settings.seed = seed
        SAMSVAE.setup_anndata(cells, **_LABELS)
        model = SAMSVAE(cells)
        model.train(train_size=1.0, accelerator="cpu", enable_progress_bar=False)
        sources["model"] = model.get_average_treatment_effect(measured, seed=seed)
    exact = truth.loc[unseen].to_numpy()
    mean = BASELINES["perturbed mean"](observed, unseen).X
    rows = []
    for source, effects in sources.items():
        for name, size in _NOISE.items():
            features = noise if np.isinf(size) else signal + size * noise
            embedding = pd.DataFrame(features, index=names)
            watch = Stopwatch()
            found = {}
            for level in _LEVELS:
                with watch():
                    found[level] = predict_unseen(effects, embedding, unseen, credible_level=level)
            rows.append(
                {
                    "seed": seed,
                    "effects": source,
                    "embedding": name,
                    "supported": float(found[level].uns["scvi_sams"]["supported"]),
                    "error / mean's": _square(found[level].X - exact) / _square(mean - exact),
                    **{f"coverage {level:.0%}": _inside(found[level], exact) for level in found},
                    "core seconds": watch.cpu,
                }
            )
    return rows


def _square(difference: np.ndarray) -> float:
    return float((difference**2).sum())


def _inside(found: ad.AnnData, exact: np.ndarray) -> float:
    return float(((found.layers["lower"] <= exact) & (exact <= found.layers["upper"])).mean())


if __name__ == "__main__":
    main()
