"""Sparse, additive, interpretable models of Perturb-seq screens, at home in scvi-tools.

Subpackages and models are imported when they are first asked for, so that the command line
answers a wrong argument at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from scvi_sams._exceptions import (
    FitWarning,
    ScreenError,
    TrainingDivergedError,
    UnknownPerturbationError,
)

if TYPE_CHECKING:
    from scvi_sams import data, datasets, evaluation, model, module, pl, tl, train
    from scvi_sams.model import CPAVAE, SAMSVAE, ConditionalVAE, SVAEPlus

    __version__: str

__all__ = [
    "CPAVAE",
    "SAMSVAE",
    "ConditionalVAE",
    "SVAEPlus",
    "FitWarning",
    "ScreenError",
    "TrainingDivergedError",
    "UnknownPerturbationError",
    "data",
    "datasets",
    "evaluation",
    "model",
    "module",
    "pl",
    "tl",
    "train",
]

_MODELS = frozenset({"CPAVAE", "SAMSVAE", "ConditionalVAE", "SVAEPlus"})


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("scvi-sams")
    if name in _MODELS:
        return getattr(import_module("scvi_sams.model"), name)
    if name in __all__:
        return import_module(f"scvi_sams.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
