"""Sparse, additive, interpretable models of Perturb-seq screens, at home in scvi-tools."""

from importlib.metadata import version

from scvi_sams import data, datasets, evaluation, model, module, pl, tl, train
from scvi_sams._exceptions import ScreenError, TrainingDivergedError, UnknownPerturbationError
from scvi_sams.model import CPAVAE, SAMSVAE, ConditionalVAE, SVAEPlus

__version__ = version("scvi-sams")

__all__ = [
    "CPAVAE",
    "SAMSVAE",
    "ConditionalVAE",
    "SVAEPlus",
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
