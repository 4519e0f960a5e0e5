"""Sparse, additive, interpretable models of Perturb-seq screens, at home in scvi-tools."""

from importlib.metadata import version

from scvi_sams import data, datasets, metrics, model, module, pl, train
from scvi_sams._exceptions import ScreenError, TrainingDivergedError, UnknownPerturbationError
from scvi_sams.model import SAMSVAE

__version__ = version("scvi-sams")

__all__ = [
    "SAMSVAE",
    "ScreenError",
    "TrainingDivergedError",
    "UnknownPerturbationError",
    "data",
    "datasets",
    "metrics",
    "model",
    "module",
    "pl",
    "train",
]
