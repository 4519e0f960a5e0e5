"""Schedules of training as functions of progress, never of time."""

from __future__ import annotations

import math

_SHALLOW = 1_000  # counts a cell


def share_done(step: int, n_steps: int) -> float:
    """Share of training done after ``step`` of ``n_steps`` steps; 0 where there are none.

    Examples
    --------
    >>> share_done(50, 200)
    0.25
    """
    return step / n_steps if n_steps else 0.0


def default_warmups(counts_per_cell: float, is_closed_form: bool) -> tuple[float, float]:
    """Shares of training before the divergence of the basal state and the masks are fully on.

    Of screens by mean library size; :class:`~scvi_sams.train.SAMSTrainingPlan` says why. The
    gradient engine learns masks from the start.

    Examples
    --------
    >>> default_warmups(800.0, is_closed_form=True)
    (0.8, 0.4)
    """
    divergence, mask = (0.8, 0.4) if counts_per_cell < _SHALLOW else (0.4, 0.5)
    return divergence, mask if is_closed_form else 0.0


def default_pulse(counts_per_cell: float, prunes: bool) -> float:
    """Height of the pulse of the weight on the divergence of the basal state.

    It `prunes` where masks are by closed form and doses as they are. In shallow cells, and where
    features have no counts (infinite here) to tell how sure they are, it would prune what is real.

    Examples
    --------
    >>> default_pulse(8_000.0, prunes=True)
    6.0
    """
    return 6.0 if prunes and _SHALLOW <= counts_per_cell < math.inf else 1.0


def linear_warmup(progress: float, duration: float, start: float = 0.0) -> float:
    """Weight that rises from ``start`` to one over the first ``duration`` of training.

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

    Examples
    --------
    >>> cosine_learning_rate(1000, 1000)
    0.02
    """
    rise = min(1.0, (step + 1) / n_warmup_steps) if n_warmup_steps else 1.0
    progress = min(1.0, step / max(n_steps, 1))
    half_cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return rise * (final_factor + (1 - final_factor) * half_cosine)


def pulse(progress: float, start: float, height: float, duration: float = 0.3) -> float:
    """Factor that jumps to a height, stays for half of the duration and returns to one.

    Examples
    --------
    >>> [round(pulse(share, 0.5, 6.0), 2) for share in (0.4, 0.5, 0.65, 0.725, 0.8)]
    [1.0, 6.0, 6.0, 3.5, 1.0]
    """
    done = (progress - start) / duration
    if not 0 <= done < 1:
        return 1.0
    return 1 + (height - 1) * min(1.0, 2 * (1 - done))
