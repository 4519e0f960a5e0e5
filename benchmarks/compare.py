"""What got worse between two runs of the benchmarks by more than noise: slower, larger, less true.

Each side is a file that ``--json`` wrote, or a folder of them, in which several files of one
benchmark (``throughput.json``, ``throughput-2.json``) are repetitions. The exit status is 1 if
anything got worse.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy.stats import t as student_t

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Change", "changes", "main", "read_rows"]

Row = dict[str, Any]
Key = tuple[str, tuple[tuple[str, Any], ...]]


@dataclass(frozen=True)
class Kind:
    """A kind of figure: which way is better, and what is no difference, however sure it is."""

    pattern: str
    better: Literal["lower", "higher"] | float
    """Or the value that is right."""
    floor: float
    """Zero for figures that are not judged."""
    is_ratio: bool = False
    """Whether the floor is a factor, not a difference."""


# The first pattern that is found in the name of a column counts. Floors of time and memory are
# what the same code differs by on a machine that does something else besides; ratios of two
# things measured in turn differ less. Floors of quality are what another seed changes where many
# perturbations are averaged over.
KINDS = (
    Kind(r"standard error|\(sd\)|lowest|highest|restarts|before|raw|sum of singles|active", 0, 0),
    Kind(r"latents of the pathway", 1.0, 0.5),
    Kind(r"empty masks", "higher", 1.0),
    Kind(r"MiB|memory", "lower", 1.1, True),
    Kind(r"beside memory|^ratio$", "higher", 1.15, True),
    Kind(r"step / products", "lower", 1.15, True),
    Kind(r"a (processor )?second|cells a second|GFLOP/s", "higher", 1.5, True),
    Kind(
        r"seconds|^(data|forward|backward|optimiser|guard.*|step|frame|sweep)$", "lower", 1.5, True
    ),
    Kind(r"coverage 50", 0.5, 0.03),
    Kind(r"coverage 80", 0.8, 0.03),
    Kind(r"coverage 95", 0.95, 0.03),
    Kind(r"collapse index", 1.0, 0.1),
    Kind(r"IWELBO|bound", "higher", 0.2),
    Kind(r"\bloss\b", "lower", 0.5),
    Kind(r"FDR|false|inactive", "lower", 0.03),
    Kind(r"error|WMSE|distance", "lower", 0.02),
    Kind(
        r"correlation|\br\b|\br2\b|\bF1\b|MCC|PDS|precision|recall|power|agree|^pairs$",
        "higher",
        0.02,
    ),
)
REPETITIONS = ("seed", "split", "round", "repetition")
"""Columns that tell rows apart which are otherwise the same measurement."""
NOTES = ("not empty", "other masks")
"""Columns of results in words, which are neither figures nor labels."""


@dataclass(frozen=True)
class Change:
    """One figure on both sides."""

    benchmark: str
    row: str
    measure: str
    old: float
    new: float
    verdict: Literal["worse", "better", "level"]


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, print what changed, and say by the exit status whether anything got worse."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, help="file or folder of the run before")
    parser.add_argument("new", type=Path, help="file or folder of the run after")
    parser.add_argument(
        "--noise",
        type=float,
        default=1.0,
        help="factor on all floors: less on a machine that does nothing else",
    )
    arguments = parser.parse_args(argv)
    old, new = read_rows(arguments.old), read_rows(arguments.new)
    found, unknown = changes(old, new, arguments.noise)
    if not found:
        raise SystemExit("Nothing can be compared: no row is on both sides.")
    for verdict in ("worse", "better"):
        chosen = [change for change in found if change.verdict == verdict]
        if chosen:
            print(f"\n### {verdict.capitalize()}\n")
            print("| benchmark | row | measure | old | new |\n| --- | --- | --- | --- | --- |")
        for change in chosen:
            print(
                f"| {change.benchmark} | {change.row} | {change.measure} "
                f"| {change.old:.4g} | {change.new:.4g} |"
            )
    for side, missing in (("NEW", old.keys() - new.keys()), ("OLD", new.keys() - old.keys())):
        for benchmark, labels in sorted(missing, key=str):
            print(f"\nNot in {side}: {benchmark}, {_shown(labels)}")
    if unknown:
        print(f"\nNot judged, as it is not known which way is better: {', '.join(unknown)}.")
    n = {verdict: sum(c.verdict == verdict for c in found) for verdict in ("worse", "better")}
    print(f"\n{len(found)} figures compared: {n['worse']} worse, {n['better']} better.")
    return int(n["worse"] > 0)


def read_rows(path: Path) -> dict[Key, list[Row]]:
    """Rows of a file or a folder, by benchmark and labels; repetitions of a row lie together."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise SystemExit(f"There is no file that --json wrote at {path}.")
    rows: dict[Key, list[Row]] = {}
    for number, file in enumerate(files):
        benchmark = re.sub(r"-\d+$", "", file.stem) if path.is_dir() else "benchmark"
        for row in json.loads(file.read_text()):
            if "mean" in [row.get(name) for name in REPETITIONS]:
                continue
            labels = tuple((name, value) for name, value in row.items() if _is_label(name, value))
            repetition = tuple(row.get(name) for name in REPETITIONS), number
            rows.setdefault((benchmark, labels), []).append(row | {"": repetition})
    return rows


def _kind(name: str) -> Kind | None:
    return next((kind for kind in KINDS if re.search(kind.pattern, name)), None)


def _is_label(name: str, value: Any) -> bool:
    """Whether a column says what was measured: words and whole numbers that are no result."""
    if name in REPETITIONS or name in NOTES:
        return False
    return isinstance(value, str) or name == "nominal" or (type(value) is int and not _kind(name))


def changes(
    old: dict[Key, list[Row]], new: dict[Key, list[Row]], noise: float = 1.0
) -> tuple[list[Change], list[str]]:
    """Judge every figure that both sides have; list columns of which no kind is known."""
    found, unknown = [], set()
    for key in old.keys() & new.keys():
        rows = sorted(old[key], key=_repetition), sorted(new[key], key=_repetition)
        labels, shared = dict(key[1]), rows[0][0].keys() & rows[1][0].keys()
        for name in shared - labels.keys() - {"", *REPETITIONS, *NOTES}:
            kind = _kind(name)
            if kind is None:
                unknown.add(name)
            elif kind.floor:
                found.append(_judge(key, name, kind, *rows, noise))
    return sorted(found, key=lambda c: (c.benchmark, c.row, c.measure)), sorted(unknown)


def _repetition(row: Row) -> str:
    return str(row[""])


def _judge(
    key: Key, name: str, kind: Kind, old: list[Row], new: list[Row], noise: float
) -> Change:
    """Whether a figure got worse by more than its floor and than its repetitions say by chance."""
    values = [np.array([row.get(name, np.nan) for row in rows], float) for rows in (old, new)]
    means = [float(np.mean(each)) for each in values]
    goodness = [_goodness(each, kind) for each in values]
    floor = np.log(kind.floor) if kind.is_ratio else kind.floor
    gain = float(goodness[1].mean() - goodness[0].mean())
    verdict: Literal["worse", "better", "level"] = "level"
    if np.isnan(means[1]) != np.isnan(means[0]):
        verdict = "worse" if np.isnan(means[1]) else "better"
    elif abs(gain) > max(noise * floor, _by_chance(name, goodness, old, new)):
        verdict = "better" if gain > 0 else "worse"
    return Change(key[0], _shown(key[1]), name, *means, verdict)


def _goodness(values: np.ndarray, kind: Kind) -> np.ndarray:
    """Values on a scale on which more is better, and floors are differences."""
    if isinstance(kind.better, float):
        return -np.abs(values - kind.better)
    if kind.is_ratio:
        values = np.log(np.maximum(values, np.finfo(float).tiny))
    return values if kind.better == "higher" else -values


def _by_chance(name: str, goodness: list[np.ndarray], old: list[Row], new: list[Row]) -> float:
    """Difference that chance makes once in twenty times; zero where nothing was repeated."""
    first, second = goodness
    if f"{name} (sd)" in old[0]:  # of means over seeds, as if of one: seeds are not counted
        return 2 * float(np.hypot(old[0][f"{name} (sd)"], new[0].get(f"{name} (sd)", 0.0)))
    if [row[""][0] for row in old] == [row[""][0] for row in new] and len(first) > 1:
        apart = second - first  # of the same seeds
        error, freedom = apart.std(ddof=1) / np.sqrt(len(apart)), len(apart) - 1
    elif min(len(first), len(second)) > 1:
        error = np.sqrt(sum(each.var(ddof=1) / len(each) for each in goodness))
        freedom = len(first) + len(second) - 2
    else:
        return 0.0
    return float(error * student_t.ppf(0.975, freedom))


def _shown(labels: tuple[tuple[str, Any], ...]) -> str:
    return ", ".join(str(v) if isinstance(v, str) else f"{n} {v}" for n, v in labels) or "all"
