"""``scvi-sams fit``: from a screen to a model, tables, figures and a summary."""

from __future__ import annotations

import json
import platform
import sys
import time
from contextlib import redirect_stdout
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import scvi
import torch

from scvi_sams import tl
from scvi_sams._exceptions import counted
from scvi_sams.cli._console import CommandError, Progress, say
from scvi_sams.cli._output import staged_folder
from scvi_sams.cli._report import guard_tables, print_report, write_figures, write_scorecard
from scvi_sams.cli._resume import stopped_fit
from scvi_sams.cli._screen import (
    CONDITION,
    CONTROL,
    MIN_CELLS,
    held_out_cells,
    make_model,
    read_screen,
    reported,
)
from scvi_sams.cli._training import remove_state, train
from scvi_sams.data.field import registered_conditions
from scvi_sams.evaluation import effect_correlation, observed_effects, scorecard

if TYPE_CHECKING:
    import argparse

    from numpy.typing import NDArray

    from scvi_sams.model import CPAVAE, SAMSVAE

_PACKAGES = ("scvi_sams", "scvi_tools", "torch", "anndata")
_FDR = 0.1  # of the calls that are written
_MAX_SCORED_CELLS = 5_000  # the mean over them is good to a fraction of a nat


def fit(args: argparse.Namespace) -> None:
    """Train on a screen and write everything that came of it to ``args.output``."""
    started = time.perf_counter()
    if args.accelerator == "gpu" and not torch.cuda.is_available():
        raise CommandError("--accelerator gpu: torch finds no GPU here; use auto or cpu")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    scvi.settings.seed = args.seed
    stopped = stopped_fit(args) if args.resume else None
    if stopped is not None:
        stopped.check()
    staged = staged_folder(
        args.output, args.overwrite, None if stopped is None else stopped.folder
    )
    with staged as folder, redirect_stdout(Progress()):
        if stopped is not None:
            stopped = replace(stopped, folder=folder)  # where it was moved to
        adata = read_screen(args)
        model = make_model(adata, args)
        conditions = registered_conditions(model.adata_manager)
        held_out, whole = held_out_cells(conditions, args)
        say(
            f"{counted(adata.n_obs, 'cell')} x {counted(adata.n_vars, 'gene')}, "
            f"{counted(len(model.perturbation_names), 'perturbation')}, "
            f"{counted((~conditions.is_control).sum(), 'condition')}; "
            f"{counted(held_out.sum(), 'cell')} held out"
        )
        if model.module.direct_effects is None:
            say(
                "No perturbation is named like a gene, so that none has an effect of its own on "
                "its target: give targets by --targets or --target-gene-key"
            )
        if args.resume and stopped is None:
            say("There is no stopped fit to go on from: begins anew")
        model, training_seconds = train(model, held_out, args, folder, stopped)

        say("Reading out masks, effects and latents")
        effect = model.get_perturbation_effect()
        effect.to_csv(folder / "effects.csv")
        mask = effect * 0.0 + 1.0  # of CPAVAE
        if args.model == "samsvae":
            mask = model.get_perturbation_mask()
            mask.to_csv(folder / "masks.csv")
            if args.donor_key is not None:
                table = tl.mechanisms(model, _FDR, donor_key=args.donor_key)
                table.to_csv(folder / "mechanisms.csv", index=False)
        if model.module.n_contexts > 1:
            table = tl.context_differences(model, _FDR, donor_key=args.donor_key)
            table.to_csv(folder / "context_differences.csv", index=False)
        if model.module.direct_effects is not None:
            tl.direct_effects(model).to_csv(folder / "direct_effects.csv")
        ate = model.get_average_treatment_effect(reported(conditions))
        ate.write_h5ad(folder / "ate.h5ad")
        latent = _latent(model, adata, held_out, effect.columns)
        latent.write_h5ad(folder / "latent.h5ad")

        say("Scoring held-out cells")
        measured = {
            name: _observed_effects(adata[cells], args)
            for name, cells in (("training", ~held_out), ("held out", held_out))
        }
        scores = _scores(model, held_out, ate, measured)
        names = [conditions.labels[code] for code in whole]
        verdict = []
        if names:
            card = scorecard(
                model,
                test_indices=np.flatnonzero(held_out),
                conditions=names,
                min_cells=MIN_CELLS,
                seed=args.seed,
            )
            write_scorecard(folder, card)
            verdict = list(card.verdict)
        say("Drawing")
        write_figures(folder, model.history, mask, effect, latent, ate, measured)
        guard_tables(folder)
        active = mask > 0.5
        summary = {
            **scores,
            "model": args.model,
            "n_cells": adata.n_obs,
            "n_held_out_cells": int(held_out.sum()),
            "n_genes": adata.n_vars,
            "n_conditions": int((~conditions.is_control).sum()),
            "held_out_conditions": names,
            "scorecard_verdict": verdict,
            "n_perturbations": len(model.perturbation_names),
            "n_active_perturbations": int(active.any(axis=1).sum()),
            "n_active_latents": int(active.any(axis=0).sum()),
            "perturbations": model.perturbation_names,
            "training_seconds": round(training_seconds, 2),
            "seconds": round(time.perf_counter() - started, 2),
            "peak_memory_mb": _peak_memory(),
            "versions": {"python": platform.python_version()}
            | {name: version(name.replace("_", "-")) for name in _PACKAGES},
            "seed": args.seed,
            "arguments": vars(args),
        }
        text = json.dumps(summary, indent=2, default=str)  # of a path
        (folder / "summary.json").write_text(f"{text}\n")
        remove_state(folder)
    if args.json:
        print(text)
    else:
        print_report(mask, effect, ate, summary, args.output)


def _latent(
    model: SAMSVAE | CPAVAE, adata: ad.AnnData, held_out: NDArray[np.bool_], names: pd.Index
) -> ad.AnnData:
    """Latent states (cells x latents) with the cells' annotation, and the basal states."""
    obs = adata.obs.loc[:, [not str(column).startswith("_scvi") for column in adata.obs]].copy()
    obs["scvi_sams_split"] = pd.Categorical(np.where(held_out, "held out", "training"))
    return ad.AnnData(
        model.get_latent_representation(),
        obs=obs,
        var=pd.DataFrame(index=names),
        layers={"basal": model.get_latent_representation(representation="basal")},
    )


def _observed_effects(adata: ad.AnnData, args: argparse.Namespace) -> ad.AnnData | None:
    """Effects (conditions x genes) in these cells; None where they lack controls or others."""
    is_control = adata.obs[CONDITION] == CONTROL
    few_alike = 2 * adata.obs[CONDITION].nunique() > len(adata)  # many guides a cell
    if is_control.all() or not is_control.any() or few_alike:
        return None
    return observed_effects(
        adata, CONDITION, CONTROL, layer=args.layer, size_factor_key=args.size_factor_key
    )


def _scores(
    model: SAMSVAE | CPAVAE,
    held_out: NDArray[np.bool_],
    ate: ad.AnnData,
    measured: dict[str, ad.AnnData | None],
) -> dict[str, Any]:
    """How well the model, and the plain means of its training cells, meet held-out cells."""
    iwelbo = of_model = of_means = None
    if held_out.any():
        scored = np.random.default_rng(0).permutation(np.flatnonzero(held_out))
        scored = np.sort(scored[:_MAX_SCORED_CELLS])
        iwelbo = model.get_iwelbo(indices=scored.tolist(), n_particles=100)
    training, observed = measured["training"], measured["held out"]
    if training is not None and observed is not None:
        shared = observed.obs_names.intersection(training.obs_names)
        of_model, of_means = (effect_correlation(e[shared], observed) for e in (ate, training))
    return {
        "held_out_iwelbo": iwelbo,
        "held_out_ate_correlation": of_model,
        "held_out_ate_correlation_of_training_means": of_means,
    }


def _peak_memory() -> float | None:
    """Largest resident size of the process so far, in MB; None where it cannot be had."""
    if sys.platform == "win32":
        return None
    import resource

    bytes_per_unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * bytes_per_unit / 1e6, 1)
