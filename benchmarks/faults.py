"""What becomes of cases that went wrong, of damaged files, and of processes that are killed."""

from __future__ import annotations

import itertools
import multiprocessing
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scvi.model.base import BaseModelClass

from benchmarks._common import parser, prepare, print_table
from benchmarks._fault_cases import CASES, Bench, what_happens
from scvi_sams import SAMSVAE, ScreenError
from scvi_sams.datasets import simulated_screen

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.connection import Connection

__all__ = ["damaged_copies", "kills", "main", "save_a_model"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark: cases, damaged files, then kills."""
    arguments = parser(__doc__)
    arguments.add_argument("--damaged", type=int, default=60, help="copies of a file")
    arguments.add_argument("--kills", type=int, default=40)
    arguments.add_argument("--hidden", type=int, default=400, help="units of a hidden layer")
    arguments.add_argument("--seed", type=int, default=0)
    arguments = arguments.parse_args(argv)
    prepare(arguments)
    bench = Bench()
    rows = [
        {"id": number, "case": title, "now": what_happens(number, bench)}
        for number, (title, _) in CASES.items()
    ]
    print_table("Cases that went wrong", rows, arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_a_model(folder / "model", n_hidden=arguments.hidden)
        rows = [
            {"read by": reader, **damaged_copies(folder, arguments.damaged, load, arguments.seed)}
            for reader, load in (("scvi-tools", load_as_scvi_tools), ("this package", load_model))
        ]
        print_table("Damaged copies of a model file", rows, arguments)
        rows = [
            {"saved by": writer, **kills(folder, arguments.kills, save, arguments.seed)}
            for writer, save in (
                ("scvi-tools", BaseModelClass.save),
                ("this package", SAMSVAE.save),
            )
        ]
        print_table("Kills of a process that saves over a model", rows, arguments)


def save_a_model(folder: Path, n_hidden: int = 400) -> None:
    """Save a model with its cells that has made a pass over them."""
    adata = simulated_screen(n_cells=300, n_genes=100, n_perturbations=6, n_pairs=2)
    del adata.uns["truth"]
    SAMSVAE.setup_anndata(adata, "counts", perturbation_key="perturbation", control="control")
    model = SAMSVAE(adata, n_latent=6, n_hidden=n_hidden)
    model.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False)
    model.save(folder, overwrite=True, save_anndata=True)


def load_model(folder: Path) -> SAMSVAE:
    """Load as this package does."""
    return SAMSVAE.load(folder, accelerator="cpu")


def load_as_scvi_tools(folder: Path) -> SAMSVAE:
    """Load as scvi-tools does, without checks."""
    return BaseModelClass.load.__func__(SAMSVAE, str(folder), accelerator="cpu")


def damaged_copies(
    folder: Path,
    n_copies: int,
    load: Callable[[Path], SAMSVAE] = load_model,
    seed: int = 0,
) -> dict[str, int]:
    """Flip bytes of copies of ``folder/model``, or cut them off, and count what loading makes.

    Parameters
    ----------
    folder
        Where the model is, and the copies go.
    n_copies
        Number of copies: two of three have a byte flipped, the others are cut off.
    load
        What loads a folder.
    seed
        Seed of the places.

    Returns
    -------
    Numbers of copies by outcome.
    """
    rng = np.random.default_rng(seed)
    whole = (folder / "model" / "model.pt").read_bytes()
    expected = _fingerprint(load_model(folder / "model"))
    copy = folder / "copy"
    copy.mkdir(exist_ok=True)
    (copy / "adata.h5ad").write_bytes((folder / "model" / "adata.h5ad").read_bytes())
    found = dict.fromkeys(
        ("copies", "refused by name", "loaded right", "loaded wrong", "another error"), 0
    )
    for number in range(n_copies):
        place = int(rng.integers(len(whole)))
        flipped = bytes([whole[place] ^ int(rng.integers(1, 256))])
        cut_off = number % 3 == 2
        content = whole[:place] if cut_off else whole[:place] + flipped + whole[place + 1 :]
        (copy / "model.pt").write_bytes(content)
        found["copies"] += 1
        found[_outcome(copy, load, expected)] += 1
    return found


def _outcome(copy: Path, load: Callable[[Path], SAMSVAE], expected: list[Any]) -> str:
    try:
        fingerprint = _fingerprint(load(copy))
    except ScreenError as error:
        named = f"{copy / 'model.pt'} is damaged" in str(error)
        return "refused by name" if named else "another error"
    except Exception:  # noqa: BLE001 - of whatever kind: it names no file and no mend
        return "another error"
    return "loaded right" if _same(fingerprint, expected) else "loaded wrong"


def _fingerprint(model: SAMSVAE) -> list[Any]:
    """All that a model says follows from these: weights, genes, registry, arguments."""
    genes, arguments = list(model.get_var_names()), repr(model.init_params_)
    return [model.module.state_dict(), genes, repr(dict(model.registry)), arguments]


def _same(found: list[Any], expected: list[Any]) -> bool:
    weights, others = found[0], expected[0]
    return (
        weights.keys() == others.keys()
        and all(torch.equal(weights[name], others[name]) for name in weights)
        and found[1:] == expected[1:]
    )


def kills(
    folder: Path, n_kills: int, save: Callable[..., None] = SAMSVAE.save, seed: int = 0
) -> dict[str, int]:
    """Kill processes at random moments while they save over a model, and count what they leave.

    Parameters
    ----------
    folder
        Where ``folder/model`` is, and a copy of it is saved over again and again.
    n_kills
        Number of processes.
    save
        What saves a model: a method, as a function.
    seed
        Seed of the moments.

    Returns
    -------
    Numbers of kills by what they left.
    """
    rng = np.random.default_rng(seed)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    target = folder / "killed"
    found = {"kills": 0, "a model that loads": 0, "none that loads": 0}
    for _ in range(n_kills):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(folder / "model", target)
        told, tells = processes.Pipe(duplex=False)
        arguments = (folder / "model", target, save, tells)
        process = processes.Process(target=_save_again_and_again, args=arguments)
        process.start()
        seconds = told.recv()  # that one save takes
        time.sleep(float(rng.uniform(0, 2 * seconds)))
        process.kill()
        process.join()
        found["kills"] += 1
        found["a model that loads" if _loads(target) else "none that loads"] += 1
    return found


def _save_again_and_again(
    source: Path, target: Path, save: Callable[..., None], tells: Connection
) -> None:
    torch.set_num_threads(1)
    model = load_model(source)
    for number in itertools.count():
        start = time.perf_counter()
        save(model, str(target), overwrite=True, save_anndata=True)
        if number == 1:  # the first is slower
            tells.send(time.perf_counter() - start)


def _loads(folder: Path) -> bool:
    try:
        SAMSVAE.load(folder, accelerator="cpu", trusted=True)  # scvi-tools saves pickles
    except Exception:  # noqa: BLE001 - of whatever kind
        return False
    return True
