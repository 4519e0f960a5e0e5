"""Where the seconds of a training step go, against the matrix products that it must do."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
import scvi
import torch

from benchmarks._common import prepare, print_table
from benchmarks._speed import clock, random_screen, speed_parser, training_arguments
from scvi_sams import SAMSVAE
from scvi_sams.train import SAMSTrainingPlan

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

__all__ = ["main"]

_PARTS = ("data", "forward", "backward", "optimiser", "guard and global updates")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = speed_parser(__doc__)
    arguments.add_argument("--cells", type=int, default=20_000)
    arguments.add_argument("--genes", type=int, default=1_200)
    arguments.add_argument("--perturbations", type=int, default=170)
    arguments.add_argument("--batch-sizes", type=int, nargs="+", default=[128, 512])
    arguments.add_argument(
        "--data-placement", nargs="+", default=["device", "host"], choices=["device", "host"]
    )
    arguments = arguments.parse_args(argv)
    if arguments.quick:
        arguments.cells, arguments.batch_sizes = 5_000, [128]
    prepare(arguments)
    rows = [
        {"batch size": batch_size, "cells kept": placement}
        | _run(batch_size, placement, arguments)
        for batch_size in arguments.batch_sizes
        for placement in arguments.data_placement
    ]
    title = (
        f"Milliseconds of a step, {arguments.genes} genes, {arguments.perturbations} "
        f"perturbations, {arguments.accelerator}"
    )
    print_table(title, rows, arguments, digits=2)


def _run(batch_size: int, placement: str, arguments: argparse.Namespace) -> dict[str, float]:
    screen = random_screen(arguments.cells, arguments.genes, arguments.perturbations)
    SAMSVAE.setup_anndata(screen, perturbation_key="perturbation", control="control")
    scvi.settings.seed = 0
    model = SAMSVAE(screen)
    parts: defaultdict[str, list[float]] = defaultdict(list)
    model._training_plan_cls = _timed_plan(parts, arguments.accelerator)
    model.train(
        max_epochs=2,
        batch_size=batch_size,
        data_placement=placement,
        plan_kwargs={"mask_warmup_fraction": 0.0},
        **training_arguments(arguments),
    )
    milliseconds = {part: 1e3 * float(np.mean(parts[part][10:])) for part in _PARTS}
    step = sum(milliseconds.values())
    n_operations = _matrix_operations(model.module, batch_size)
    rate = _matrix_rate(model.module, batch_size, arguments.accelerator)
    products = 1e3 * n_operations / rate
    return milliseconds | {
        "step": step,
        "matrix products alone": products,
        "step / products": step / products,
        "measured GFLOP/s": rate / 1e9,
    }


def _timed_plan(parts: defaultdict[str, list[float]], accelerator: str) -> type[SAMSTrainingPlan]:
    """A plan that takes the time of the parts of each step."""

    class TimedPlan(SAMSTrainingPlan):
        _end: float | None = None

        def on_train_batch_start(self, *args: Any) -> None:
            if self._end is not None:
                parts["data"].append(clock(accelerator) - self._end)

        def training_step(self, *args: Any) -> torch.Tensor:
            start = clock(accelerator)
            loss = super().training_step(*args)
            parts["forward"].append(clock(accelerator) - start)
            return loss

        def backward(self, *args: Any, **kwargs: Any) -> None:
            start = clock(accelerator)
            super().backward(*args, **kwargs)
            parts["backward"].append(clock(accelerator) - start)

        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            start = clock(accelerator)
            super().optimizer_step(*args, **kwargs)
            whole = clock(accelerator) - start
            parts["optimiser"].append(whole - parts["forward"][-1] - parts["backward"][-1])

        def on_train_batch_end(self, *args: Any) -> None:
            start = clock(accelerator)
            super().on_train_batch_end(*args)
            self._end = clock(accelerator)
            parts["guard and global updates"].append(self._end - start)

        def on_train_epoch_start(self) -> None:
            self._end = None

    return TimedPlan


def _linear_layers(module: torch.nn.Module) -> list[torch.nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)]


def _matrix_operations(module: torch.nn.Module, batch_size: int) -> float:
    """Operations of the linear layers: forward, gradient of weights and of inputs."""
    layers = _linear_layers(module)
    total = sum(6 * batch_size * layer.weight.numel() for layer in layers)
    first = module.encoder.hidden.fc_layers[0][0]
    return total - 2 * batch_size * first.weight.numel()  # counts need no gradient


def _matrix_rate(module: torch.nn.Module, batch_size: int, accelerator: str) -> float:
    """Operations a second of the largest product of a step, the median of many."""
    largest = max(_linear_layers(module), key=lambda layer: layer.weight.numel())
    weight = largest.weight.detach()
    x = torch.randn(batch_size, weight.shape[1], device=weight.device)
    seconds = []
    for _ in range(50):
        start = clock(accelerator)
        for _ in range(4):
            x @ weight.T
        seconds.append((clock(accelerator) - start) / 4)
    return 2 * batch_size * weight.numel() / float(np.median(seconds))
