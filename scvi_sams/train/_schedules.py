"""Schedules of training as functions of progress, never of time."""

from __future__ import annotations

import math

__all__ = ["cosine_learning_rate", "linear_warmup"]


def linear_warmup(progress: float, duration: float, start: float = 0.0) -> float:
    """Weight that rises from ``start`` to one over the first ``duration`` of training.

    Parameters
    ----------
    progress
        Share of training done, from 0 to 1.
    duration
        Share of training that the rise takes; 0 for none.
    start
        Weight at the beginning.

    Examples
    --------
    >>> linear_warmup(0.15, duration=0.3)
    0.5
    """
    if progress >= duration:
        return 1.0
    return start + (1 - start) * progress / duration


def cosine_learning_rate(
    step: int, n_steps: int, *, n_warmup_steps: int = 50, final_factor: float = 0.02
) -> float:
    """Factor on the learning rate: a short linear rise, then half a cosine.

    Parameters
    ----------
    step
        Steps done.
    n_steps
        Steps in all.
    n_warmup_steps
        Length of the rise.
    final_factor
        Factor at the end.

    Examples
    --------
    >>> cosine_learning_rate(1000, 1000)
    0.02
    """
    rise = min(1.0, (step + 1) / n_warmup_steps) if n_warmup_steps else 1.0
    progress = min(1.0, step / max(n_steps, 1))
    half_cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return rise * (final_factor + (1 - final_factor) * half_cosine)
