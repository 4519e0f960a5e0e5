"""Write ``checkpoints.tar.xz`` and ``read_outs.npz`` that ``test_frozen.py`` compares with.

It was run once, on version 0.1.0, before the package was rearranged: what it wrote says which
numbers 0.1.0 gives, and that its saved models still load. It is kept to show how the files came
about. Run it again only where numbers are meant to change, and say so in ``CHANGELOG.md``:
``OMP_NUM_THREADS=1 python -m tests.frozen.make_frozen`` from the root of the repository.
"""

from __future__ import annotations

import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch

from tests.frozen._members import (
    CHECKPOINTS_FILE,
    MEMBERS,
    READ_OUTS_FILE,
    all_figures,
    arithmetic,
    fit,
    screen,
)


def main() -> None:
    torch.set_num_threads(1)
    frozen = {"screen": screen().layers["counts"].astype(np.uint16), "arithmetic": arithmetic()}
    with tempfile.TemporaryDirectory() as folder, tarfile.open(CHECKPOINTS_FILE, "w:xz") as pack:
        for name in MEMBERS:
            model = fit(name, Path(folder))
            model.save(f"{folder}/{name}")
            pack.add(f"{folder}/{name}/model.pt", f"{name}/model.pt")
            frozen |= {f"{name}/{key}": values for key, values in all_figures(model).items()}
    np.savez_compressed(READ_OUTS_FILE, **frozen)


if __name__ == "__main__":
    main()
