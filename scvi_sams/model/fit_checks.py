"""What a fit that was too short, or learned its cells by heart, shows at its end."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import scvi
import torch
from scvi import REGISTRY_KEYS

from scvi_sams._exceptions import FitWarning, counted
from scvi_sams.data.matrices import rows_of
from scvi_sams.model.trivial import trivial_log_likelihood

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd
    from numpy.typing import NDArray
    from torch import Tensor

    from scvi_sams.model.samsvae import SAMSVAE


_LONGER = "Train longer (max_epochs={}); all schedules follow the share that is done."
_NARROWER = "Give it less room: fewer epochs (max_epochs={}) or narrower networks (n_hidden={})."
_MIN_SHARING = 3  # perturbations: two of one pathway are no rarity
_MIN_EPOCHS = 4  # of a curve that has halves
# Of a straight line, half of the fall is in the second half; of a curve that is settling, less
# than half of that.
_SETTLED = 0.25
_N_TRAINING, _N_VALIDATION = 2_000, 500  # cells: for two numbers a gene, and a mean to compare
_N_STANDARD_ERRORS = 3.0


def warn_of_fit(model: SAMSVAE) -> None:
    """Warn of a fit that was too short, or too long for its cells, and name the mend.

    Parameters
    ----------
    model
        A model that was just trained.
    """
    n_epochs = model.trainer.current_epoch
    longer = _LONGER.format(2 * n_epochs)
    effects = model.module.effects
    if effects is not None and effects.sparse and not effects.is_frozen:
        is_on = effects.mask_probability()[: effects.n_perturbations].gt(0.5).cpu().numpy()
        if all_on_one_latent(is_on):
            _warn(
                f"{int(is_on.any(1).sum())} of {counted(len(is_on), 'perturbation')} move one "
                "latent that all of them share, and nothing else does: so a model sees them that "
                f"has not yet learned to tell states apart. {longer}"
            )
    history = model.history or {}
    if still_falls(_curve(history, "elbo_train")):
        _warn(
            "The bound was still falling when training ended: more than a quarter of its fall "
            f"came in the second half. {longer}"
        )
    narrower = _NARROWER.format(
        max(1, n_epochs // 2), max(1, model.module.decoder.logits.in_features // 2)
    )
    validation = _curve(history, "elbo_validation")
    if len(validation) == n_epochs and validation_rose(_curve(history, "elbo_train"), validation):
        _warn(
            "Validation cells are described worse at the end than before: their bound lost more "
            f"than that of the training cells gained. {narrower}"
        )
    difference = _gain_over_trivial(model)
    if difference is not None and _is_negative(difference):
        _warn(
            "Validation cells are described better by a model that knows one rate a gene and "
            f"batch, and nothing else: by {-difference.mean():.1f} nats a cell. The networks "
            f"learned the training cells by heart. {narrower}"
        )


def all_on_one_latent(is_on: NDArray[np.bool_]) -> bool:
    """Whether at least half of the perturbations have a mask, all on one and the same latent.

    Parameters
    ----------
    is_on
        Masks, perturbations x latents.

    Examples
    --------
    >>> all_on_one_latent(np.array([[1, 0], [1, 0], [1, 0], [0, 0]], dtype=bool))
    True
    >>> all_on_one_latent(np.array([[1, 0], [1, 0], [1, 0], [0, 1]], dtype=bool))
    False
    """
    n_active = is_on.any(1).sum()
    return bool(
        is_on.any(0).sum() == 1 and n_active >= _MIN_SHARING and 2 * n_active >= len(is_on)
    )


def still_falls(bound: NDArray[np.float64]) -> bool:
    """Whether a negative bound (nats a cell, by epoch) had not settled when training ended.

    Examples
    --------
    >>> still_falls(np.array([100.0, 95.0, 90.0, 85.0, 80.0]))
    True
    >>> still_falls(np.array([100.0, 84.0, 81.0, 80.5, 80.0]))
    False
    """
    if len(bound) < _MIN_EPOCHS or not np.isfinite(bound).all():
        return False
    fall = bound[0] - bound[-1]
    half_way = np.interp((len(bound) - 1) / 2, np.arange(len(bound)), bound)
    return bool(fall > 0 and half_way - bound[-1] > _SETTLED * fall)


def validation_rose(training: NDArray[np.float64], validation: NDArray[np.float64]) -> bool:
    """Whether validation cells lost, since they were best, more than training cells gained.

    Parameters
    ----------
    training, validation
        Negative bounds, nats a cell, of every epoch. Each is read as means of tenths of training,
        since the bound of few cells is noisy from epoch to epoch.

    Examples
    --------
    >>> training = np.linspace(100.0, 80.0, 40)
    >>> validation_rose(training, np.r_[np.linspace(100.0, 90.0, 10), np.linspace(90, 120, 30)])
    True
    >>> validation_rose(training, np.r_[np.linspace(100.0, 90.0, 10), np.linspace(90, 95, 30)])
    False
    """
    if min(len(training), len(validation)) < 10 * _MIN_EPOCHS:
        return False
    of_training, of_validation = (
        np.array([part.mean() for part in np.array_split(curve, 10)])
        for curve in (training, validation)
    )
    best = int(of_validation.argmin())
    gained = max(of_training[best] - of_training[-1], 0.0)
    # Of the difference of two means of a tenth, from how the curve jumps between epochs.
    noise = np.diff(validation).std() / (len(validation) / 10) ** 0.5
    lost = of_validation[-1] - of_validation[best]
    return bool(lost > gained + _N_STANDARD_ERRORS * noise)


def _curve(history: Mapping[str, pd.DataFrame], name: str) -> NDArray[np.float64]:
    if name not in history:
        return np.zeros(0)
    return history[name].iloc[:, 0].dropna().to_numpy(dtype=np.float64)


def _gain_over_trivial(model: SAMSVAE) -> NDArray[np.float64] | None:
    """Bounds of some validation cells less what the trivial model says, if both can be had."""
    if model.adata is None or not model.module.is_count_model:
        return None
    chosen = [
        np.sort(np.random.default_rng(0).permutation(indices)[:n])
        for indices, n in (
            (model.train_indices, _N_TRAINING),
            (model.validation_indices, _N_VALIDATION),
        )
    ]
    if min(map(len, chosen)) < 2:
        return None
    trivial = trivial_log_likelihood(*(part for cells in chosen for part in _cells(model, cells)))
    with torch.random.fork_rng():  # what is drawn later is as without this look
        bound = model.get_iwelbo(indices=chosen[1].tolist(), return_mean=False)
    return np.asarray(bound - trivial.numpy(), dtype=np.float64)


def _cells(model: SAMSVAE, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, library sizes and batches of some cells."""
    manager = model.adata_manager
    counts = manager.get_from_registry(REGISTRY_KEYS.X_KEY)
    rows = rows_of(counts, indices)
    x = torch.as_tensor(rows if isinstance(rows, np.ndarray) else rows.toarray()).float()
    library = x.sum(1)
    if model.module.use_size_factor_key:
        sizes = manager.get_from_registry(REGISTRY_KEYS.SIZE_FACTOR_KEY)
        library = torch.as_tensor(np.asarray(sizes, dtype=np.float32).ravel()[indices])
    batch = np.asarray(manager.get_from_registry(REGISTRY_KEYS.BATCH_KEY)).ravel()[indices]
    return x, library, torch.as_tensor(batch.astype(np.int64))


def _is_negative(difference: NDArray[np.float64]) -> bool:
    """Whether a mean is below zero beyond chance."""
    error = difference.std(ddof=1) / len(difference) ** 0.5
    return bool(difference.mean() < -_N_STANDARD_ERRORS * error)


def _warn(message: str) -> None:
    warnings.warn(message, FitWarning, stacklevel=scvi.settings.warnings_stacklevel)
