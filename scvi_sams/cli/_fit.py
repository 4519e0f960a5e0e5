"""``scvi-sams fit``: from a screen to a model, tables, figures and a summary."""

from __future__ import annotations

__all__ = ["fit"]

import json
import platform
import sys
import time
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import scvi
import torch
from rich.console import Console

import scvi_sams
from scvi_sams.cli._errors import CommandError
from scvi_sams.cli._held_out import MIN_CELLS, held_out_conditions
from scvi_sams.cli._output import staged_folder
from scvi_sams.cli._progress import EpochLines
from scvi_sams.cli._report import (
    CONDITION,
    CONTROL,
    print_report,
    write_figures,
    write_scorecard,
)
from scvi_sams.cli._screen import (
    condition_labels,
    held_out_cells,
    read_screen,
    setup_arguments,
)
from scvi_sams.evaluation import effect_correlation, observed_effects, scorecard

if TYPE_CHECKING:
    import argparse

    from numpy.typing import NDArray

_MAX_SCORED_CELLS = 5_000  # the mean over them is good to a fraction of a nat


def fit(args: argparse.Namespace) -> None:
    """Train on a screen and write everything that came of it to ``args.output``.

    Raises
    ------
    CommandError, ScreenError
        If the screen or an argument cannot be used.
    TrainingDivergedError
        If training diverged.
    """
    started = time.perf_counter()
    if args.accelerator == "gpu" and not torch.cuda.is_available():
        raise CommandError("--accelerator gpu: torch finds no GPU here; use auto or cpu")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    scvi.settings.seed = args.seed
    console = Console(stderr=True, highlight=False)
    interactive = sys.stderr.isatty()
    scvi.settings.progress_bar_style = "tqdm" if interactive else "rich"  # rich: quiet in a log

    # The progress bars of scvi-tools go to stdout, which is for the report.
    with staged_folder(args.output, args.overwrite) as folder, redirect_stdout(sys.stderr):
        adata = read_screen(args)
        scvi_sams.SAMSVAE.setup_anndata(adata, **setup_arguments(args, adata))
        options = {} if args.n_latent is None else {"n_latent": args.n_latent}
        model = scvi_sams.SAMSVAE(adata, **options)
        labels, doses = condition_labels(model, args)
        held_out = held_out_cells(labels, args.held_out_fraction, np.random.default_rng(args.seed))
        if args.held_out_fraction > 0 and not held_out.any():
            raise CommandError(
                f"--held-out-fraction {args.held_out_fraction:g} of {adata.n_obs} cells is none; "
                "raise it, or set it to 0"
            )
        conditions = held_out_conditions(labels, doses, model.perturbation_names, args)
        held_out |= labels.isin(conditions)
        if conditions and not (~held_out & labels.isna()).any():
            raise CommandError("--held-out-conditions: scores need control cells to train on")
        console.print(
            f"{adata.n_obs:,} cells x {adata.n_vars:,} genes, "
            f"{len(model.perturbation_names):,} perturbations, "
            f"{len(labels.categories):,} conditions; {held_out.sum():,} cells held out"
        )

        trained = time.perf_counter()
        nobody = np.array([], dtype=int)
        model.train(
            max_epochs=args.max_epochs,
            accelerator=args.accelerator,
            enable_progress_bar=interactive,
            callbacks=[] if interactive else [EpochLines(console)],
            datasplitter_kwargs={
                "external_indexing": [
                    np.flatnonzero(~held_out),
                    nobody,
                    np.flatnonzero(held_out),
                ]
            },
        )
        training_seconds = time.perf_counter() - trained
        # At once: whatever fails from here on, the model is there.
        model.save(str(folder / "model"))

        console.print("Reading out masks, effects and latents")
        model.get_perturbation_mask().to_csv(folder / "masks.csv")
        model.get_perturbation_effect().to_csv(folder / "effects.csv")
        ate = model.get_average_treatment_effect(doses)
        ate.write_h5ad(folder / "ate.h5ad")
        adata.obs[CONDITION] = labels.add_categories(CONTROL).fillna(CONTROL)
        latent = _latent(model, adata, held_out)
        latent.write_h5ad(folder / "latent.h5ad")

        console.print("Scoring held-out cells")
        measured = {
            name: _observed_effects(adata[cells], args)
            for name, cells in (("training", ~held_out), ("held out", held_out))
        }
        scores = _scores(model, held_out, ate, measured)
        verdict = []
        if conditions:
            card = scorecard(
                model,
                test_indices=np.flatnonzero(held_out),
                conditions=conditions,
                min_cells=MIN_CELLS,
                seed=args.seed,
            )
            write_scorecard(folder, card)
            verdict = list(card.verdict)
        console.print("Drawing")
        write_figures(folder, model, latent, ate, measured)
        active = model.get_perturbation_mask() > 0.5
        summary = {
            **scores,
            "n_cells": adata.n_obs,
            "n_held_out_cells": int(held_out.sum()),
            "n_genes": adata.n_vars,
            "n_conditions": len(labels.categories),
            "held_out_conditions": conditions,
            "scorecard_verdict": verdict,
            "n_perturbations": len(model.perturbation_names),
            "n_active_perturbations": int(active.any(axis=1).sum()),
            "n_active_latents": int(active.any(axis=0).sum()),
            "perturbations": model.perturbation_names,
            "training_seconds": round(training_seconds, 2),
            "seconds": round(time.perf_counter() - started, 2),
            "peak_memory_mb": _peak_memory(),
            "versions": _versions(),
            "seed": args.seed,
            "arguments": {
                name: str(value) if isinstance(value, Path) else value
                for name, value in vars(args).items()
            },
        }
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print_report(model, ate, summary, args.output)


def _latent(
    model: scvi_sams.SAMSVAE, adata: ad.AnnData, held_out: NDArray[np.bool_]
) -> ad.AnnData:
    """Latent states (cells x latents) with the cells' annotation, and the basal states."""
    obs = adata.obs.loc[:, [not str(column).startswith("_scvi") for column in adata.obs]].copy()
    obs["scvi_sams_split"] = pd.Categorical(np.where(held_out, "held out", "training"))
    return ad.AnnData(
        model.get_latent_representation(),
        obs=obs,
        var=pd.DataFrame(index=model.get_perturbation_mask().columns),
        layers={"basal": model.get_latent_representation(representation="basal")},
    )


def _observed_effects(adata: ad.AnnData, args: argparse.Namespace) -> ad.AnnData | None:
    """Effects (conditions x genes) in these cells; None where they lack controls or others."""
    is_control = adata.obs[CONDITION] == CONTROL
    if is_control.all() or not is_control.any():
        return None
    return observed_effects(
        adata,
        CONDITION,
        CONTROL,
        layer=args.layer,
        size_factor_key=args.size_factor_key,
        combination_delimiter=None,  # the labels are those of the model, as they stand
    )


def _scores(
    model: scvi_sams.SAMSVAE,
    held_out: NDArray[np.bool_],
    ate: ad.AnnData,
    measured: dict[str, ad.AnnData | None],
) -> dict[str, Any]:
    """How well the model, and the plain means of its training cells, meet held-out cells."""
    scores: dict[str, Any] = {
        "held_out_iwelbo": None,
        "held_out_ate_correlation": None,
        "held_out_ate_correlation_of_training_means": None,
    }
    if held_out.any():
        scored = np.flatnonzero(held_out)
        if len(scored) > _MAX_SCORED_CELLS:
            scored = np.random.default_rng(0).choice(scored, _MAX_SCORED_CELLS, replace=False)
        scores["held_out_iwelbo"] = model.get_iwelbo(
            indices=np.sort(scored).tolist(), n_particles=100
        )
    training, observed = measured["training"], measured["held out"]
    if training is not None and observed is not None:
        shared = observed.obs_names.intersection(training.obs_names)
        for name, predicted in (("", ate), ("_of_training_means", training)):
            scores[f"held_out_ate_correlation{name}"] = effect_correlation(
                predicted[shared], observed
            )
    return scores


def _versions() -> dict[str, str]:
    packages = {"scvi_sams": "scvi-sams", "scvi_tools": "scvi-tools"}
    packages |= {name: name for name in ("torch", "anndata")}
    return {"python": platform.python_version()} | {
        name: version(package) for name, package in packages.items()
    }


def _peak_memory() -> float | None:
    """Largest resident size of the process so far, in MB; None where it cannot be had."""
    if sys.platform == "win32":
        return None
    import resource

    bytes_per_unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * bytes_per_unit / 1e6, 1)
