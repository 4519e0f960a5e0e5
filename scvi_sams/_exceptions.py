"""Errors that tell a user what is wrong with a screen or a training run, and how to mend it."""

from __future__ import annotations

__all__ = ["ScreenError", "TrainingDivergedError", "UnknownPerturbationError"]


class ScreenError(ValueError):
    """The AnnData, or an argument that describes it, cannot be used as it is.

    The message names the culprit (cell, gene, perturbation, argument) and the mend. The command
    line prints it as one line; everything else that is raised is a bug of the package.
    """


class UnknownPerturbationError(ScreenError):
    """A condition names a perturbation that the model has never seen."""


class TrainingDivergedError(RuntimeError):
    """Training produced values that are not finite and could not be continued."""
