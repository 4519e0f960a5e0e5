"""Cells that escaped and guides that do not work: real guides, planted controls, fakes, truth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scvi
from scipy import stats

from benchmarks._common import Stopwatch, parser, prepare, print_table, read_screen, train
from scvi_sams import SAMSVAE, datasets, tl
from scvi_sams.evaluation import observed_effects

if TYPE_CHECKING:
    from collections.abc import Sequence

    import anndata as ad

__all__ = ["main"]

_PLANTED = {"IFNGR1": 0.25, "STAT1": 0.37, "SMAD4": 0.33, "IRF1": 0.22}
_LABELS = {"perturbation_key": "label", "control": "control"}
_PAPALEXI = {"batch_key": "bio_rep", "size_factor_key": "total_umi_all_genes"}
_SHOWN = ["JAK2", "STAT1", "IFNGR2", "IFNGR1", "IRF1", "BRD4", "CUL3", "SMAD4", "CMTM6", "STAT2"]
_EFFICACIES = (0.3, 0.5, 0.7, 0.9, 1.0, 1.0)
_N_FAKES, _FAKE_CELLS = 4, 150


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--screens", nargs="+", default=["papalexi", "simulated"])
    arguments.add_argument("--max-epochs", type=int)
    arguments = arguments.parse_args(argv)
    prepare(arguments)
    if "papalexi" in arguments.screens:
        _papalexi(arguments)
    if "simulated" in arguments.screens:
        _simulated(arguments)


def _fit(screen: ad.AnnData, seed: int, max_epochs: int | None, **setup: Any) -> SAMSVAE:
    scvi.settings.seed = seed
    SAMSVAE.setup_anndata(screen, guide_key="guide_label", **_LABELS, **setup)
    model = SAMSVAE(screen)
    train(model, None, max_epochs=max_epochs)
    return model


def _relabelled(
    screen: ad.AnnData, into: dict[str, dict[str, int]], rng: np.random.Generator
) -> ad.AnnData:
    """Give control cells labels and guides: so many for each guide of each label."""
    screen = screen.copy()
    label, guide = (screen.obs[c].astype(str).to_numpy() for c in ("label", "guide_label"))
    free = iter(rng.permutation(np.flatnonzero(label == "control")))
    planted = np.zeros(screen.n_obs, dtype=bool)
    for name, of_guide in into.items():
        for one, n_cells in of_guide.items():
            cells = np.array([next(free) for _ in range(n_cells)], dtype=int)
            label[cells], guide[cells], planted[cells] = name, one, True
    screen.obs["label"], screen.obs["guide_label"] = label, guide
    screen.obs["planted"] = planted
    return screen


def _reliability(expected: list[np.ndarray], true: list[np.ndarray]) -> list[dict[str, Any]]:
    p, y = np.concatenate(expected), np.concatenate(true)
    group = np.minimum((p * 10).astype(int), 9)
    return [
        {
            "probability": f"{k / 10:.1f} to {(k + 1) / 10:.1f}",
            "cells": int((group == k).sum()),
            "said": float(p[group == k].mean()),
            "true": float(y[group == k].mean()),
        }
        for k in range(10)
        if (group == k).any()
    ]


def _auc(probability: np.ndarray, is_perturbed: np.ndarray) -> float:
    found = stats.mannwhitneyu(probability[is_perturbed], probability[~is_perturbed])
    return float(found.statistic / (is_perturbed.sum() * (~is_perturbed).sum()))


def _errors(
    model: SAMSVAE, screen: ad.AnnData, perturbations: list[str], **options: Any
) -> dict[str, float]:
    """Squared error of effects against those of the cells that were not planted, relative."""
    observed = observed_effects(screen[~screen.obs["planted"].to_numpy()].copy(), **options)
    observed = observed[perturbations].X
    found = {}
    for effect in ("as_labelled", "where_it_took"):
        predicted = model.get_average_treatment_effect(perturbations, seed=0, effect=effect).X
        found[effect] = float(((predicted - observed) ** 2).sum() / (observed**2).sum())
    return found


# -- Papalexi -------------------------------------------------------------------------------------


def _papalexi(arguments: Any) -> None:
    screen = read_screen(arguments, "papalexi2021_eccite.h5ad")
    screen = screen[screen.obs["guide_frac"] > 0.5].copy()
    screen.obs["label"] = screen.obs["perturbation"].astype(str)
    screen.obs["guide_label"] = screen.obs["guide"].astype(str)
    screen.obs["planted"] = False
    guides: list[dict[str, Any]] = []
    transcripts: list[dict[str, Any]] = []
    fakes: list[dict[str, Any]] = []
    planted: list[dict[str, Any]] = []
    said: list[np.ndarray] = []
    true: list[np.ndarray] = []
    for seed in arguments.seeds:
        rng = np.random.default_rng(seed)
        half = _FAKE_CELLS // 2
        names = {f"fake{k}": {f"fake{k}g1": half, f"fake{k}g2": half} for k in range(_N_FAKES)}
        plain = _relabelled(screen, names, rng)
        model = _fit(plain, seed, arguments.max_epochs, **_PAPALEXI)
        watch = Stopwatch()
        with watch():
            table = tl.guides(model)
        for target in _SHOWN:
            own = table[table["target"] == target]
            text = ", ".join(
                f"{row.efficacy:.2f} [{row.efficacy_lower:.2f}, {row.efficacy_upper:.2f}]"
                f"{'' if row.can_be_told else ' ?'}"
                for row in own.itertuples()
            )
            guides.append({"seed": seed, "target": target, "efficacy by guide": text})
        transcripts += _transcripts(model, plain, seed)
        of_fakes = table[table["target"].str.startswith("fake")]
        rest = table[~table["target"].str.startswith("fake")]
        fakes.append(
            {
                "seed": seed,
                "guides of fakes that can be told": f"{of_fakes['can_be_told'].sum()}"
                f" of {len(of_fakes)}",
                "other guides that can be told": f"{rest['can_be_told'].sum()} of {len(rest)}",
                "flagged off target": int(table["off_target"].sum()),
                "seconds to solve": watch.cpu,
            }
        )
        into = {}
        for name, share in _PLANTED.items():
            cells = screen.obs["label"] == name
            n_planted = round(int(cells.sum()) * share / (1 - share))
            known = rng.choice(screen.obs["guide_label"][cells].astype(str), n_planted)
            into[name] = pd.Series(known).value_counts().sort_index().to_dict()
        mixed = _relabelled(screen, into, rng)
        found = _fit(mixed, seed, arguments.max_epochs, **_PAPALEXI)
        rows, p, y = _planted_rows(model, found, mixed, seed)
        planted += rows
        said += p
        true += y
    print_table("Papalexi, efficacy by guide (?: cannot be told)", guides, arguments)
    print_table("Papalexi, transcript of the target, counts per 10,000", transcripts, arguments)
    print_table("Papalexi, fakes made of controls", fakes, arguments)
    print_table("Papalexi, control cells planted under labels", planted, arguments)
    print_table("Papalexi, share that was planted", _reliability(said, true), arguments)


def _transcripts(model: SAMSVAE, screen: ad.AnnData, seed: int) -> list[dict[str, Any]]:
    rows = []
    library = screen.obs["total_umi_all_genes"].to_numpy(float)
    is_control = (screen.obs["label"] == "control").to_numpy()
    of_cells = {own: model.get_perturbed_probability(own_gene=own) for own in (False, True)}
    for target in [name for name in model.perturbation_names if name in screen.var_names]:
        x = np.asarray(screen[:, target].X.todense()).ravel() / library * 1e4
        row: dict[str, Any] = {"seed": seed, "target": target, "controls": x[is_control].mean()}
        for own, table in of_cells.items():
            p = table[table["perturbation"] == target]["probability"]
            y = x[screen.obs_names.get_indexer(p.index)]
            took = p.to_numpy() > 0.5
            suffix = "with own count" if own else "without"
            n = int((~took).sum())
            row[f"took, {suffix}"] = y[took].mean()
            row[f"escaped, {suffix} (n)"] = f"{y[~took].mean():.2f} ({n})" if n else "none"
        rows.append(row)
    return rows


def _planted_rows(
    plain: SAMSVAE, found: SAMSVAE, screen: ad.AnnData, seed: int
) -> tuple[list[dict[str, Any]], list[np.ndarray], list[np.ndarray]]:
    """Labels with planted cells, whose own cells escape as they do in the plain fit."""
    probability = found.get_perturbed_probability()
    before = plain.get_perturbed_probability()
    labels = list(_PLANTED)
    size = {
        model: tl.guides(model).groupby("target")["effect_where_it_took"].first()
        for model in (plain, found)
    }
    labelled = {
        model: np.linalg.norm(model.get_perturbation_shift(labels), axis=1)
        for model in (plain, found)
    }
    options = _LABELS | {"size_factor_key": _PAPALEXI["size_factor_key"]}
    rows, said, true = [], [], []
    for number, name in enumerate(labels):
        p = probability[probability["perturbation"] == name]["probability"]
        is_planted = screen.obs["planted"][p.index].to_numpy()
        efficacy = before[before["perturbation"] == name]["probability"].mean()
        escaped = 1 - p.to_numpy()
        # Of the escaped cells a known share was planted; the rest are the label's own.
        share = is_planted.mean() / (is_planted.mean() + (1 - is_planted.mean()) * (1 - efficacy))
        said.append(share * escaped)
        true.append(is_planted)
        errors = _errors(found, screen, [name], **options)
        rows.append(
            {
                "seed": seed,
                "label": name,
                "planted": is_planted.mean(),
                "found": 1 - p.mean() / efficacy,
                "effect as labelled, ratio": labelled[found][number] / labelled[plain][number],
                "where it took, ratio": size[found][name] / size[plain][name],
                "error as labelled": errors["as_labelled"],
                "error where it took": errors["where_it_took"],
                "AUC": _auc(p.to_numpy(), ~is_planted),
            }
        )
    return rows, said, true


# -- simulated screens ----------------------------------------------------------------------------


def _simulated(arguments: Any) -> None:
    rows: list[dict[str, Any]] = []
    said: list[np.ndarray] = []
    true: list[np.ndarray] = []
    for effect_size in (2.0, 1.0):
        for works in (False, True):
            for seed in arguments.seeds:
                screen, efficacy = _simulated_screen(seed, effect_size, works)
                model = _fit(screen, seed, arguments.max_epochs, batch_key="replicate")
                table = tl.guides(model)
                error = (table["efficacy"] - efficacy[table.index]).to_numpy()
                low, high = table["efficacy_lower"], table["efficacy_upper"]
                # The last bin reaches to one.
                inside = (low <= efficacy[table.index]) & (efficacy[table.index] <= high + 0.005)
                told = table["can_be_told"].to_numpy()
                errors = _errors(model, screen, model.perturbation_names, **_LABELS)
                p = model.get_perturbed_probability()["probability"]
                took = ~screen.obs["planted"][p.index].to_numpy()
                rows.append(
                    {
                        "effects": effect_size,
                        "all guides work": works,
                        "seed": seed,
                        "can be told": told.mean(),
                        "error, told": np.abs(error[told]).mean() if told.any() else np.nan,
                        "error, all": np.abs(error).mean(),
                        "coverage": inside.mean(),
                        "effect error as labelled": errors["as_labelled"],
                        "where it took": errors["where_it_took"],
                        "off target": int(table["off_target"].sum()),
                    }
                )
                if not works:
                    said.append(p.to_numpy())
                    true.append(took)
    print_table("Simulated screens, guides of known efficacy", rows, arguments)
    print_table("Simulated screens, cells that took", _reliability(said, true), arguments)


def _simulated_screen(seed: int, effect_size: float, works: bool) -> tuple[ad.AnnData, pd.Series]:
    """A screen with two guides a perturbation, and controls planted under their labels."""
    screen = datasets.simulated_screen(
        n_cells=6_000,
        n_perturbations=20,
        n_pairs=0,
        control_fraction=0.5,
        effect_size=effect_size,
        effect_jitter=0.15 * effect_size,
        seed=seed,
    )
    rng = np.random.default_rng(seed)
    label = screen.obs["perturbation"].astype(str).to_numpy()
    guide = label.astype(object)
    into: dict[str, dict[str, int]] = {}
    efficacy = {}
    for name in np.unique(label[label != "control"]):
        cells = rng.permutation(np.flatnonzero(label == name))
        into[name] = {}
        for number, part in enumerate(np.array_split(cells, 2)):
            one = f"{name}g{number + 1}"
            guide[part] = one
            aim = 1.0 if works else rng.choice(_EFFICACIES)
            into[name][one] = round(len(part) * (1 / aim - 1))
            efficacy[one] = len(part) / (len(part) + into[name][one])
    screen.obs["label"], screen.obs["guide_label"] = label, guide.astype(str)
    return _relabelled(screen, into, rng), pd.Series(efficacy)
