"""Kinds and ranges of arguments: one table for constructors, training and methods."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from scvi_sams._exceptions import ScreenError, listed, nearest

if TYPE_CHECKING:
    from collections.abc import Iterable


class _Kind(NamedTuple):
    """What an argument may be.

    Attributes
    ----------
    kind
        ``int``, ``float`` or ``bool``; ``str`` for words, any where none are listed.
    above, least, below, most
        Ends of the range, excluded or included.
    words
        Words that it may be (besides a number).
    optional
        Whether it may be ``None``.
    pair
        Whether it may be a pair of positive numbers.
    """

    kind: type
    above: float | None = None
    least: float | None = None
    below: float | None = None
    most: float | None = None
    words: tuple[str, ...] = ()
    optional: bool = False
    pair: bool = False

    def __str__(self) -> str:
        kinds = {int: "a whole number", float: "a number", bool: "True or False", str: ""}
        if not self.words:
            kinds[str] = "a name, as text"
        ends = {">": self.above, ">=": self.least, "<": self.below, "<=": self.most}
        limits = [f"{sign} {end:g}" for sign, end in ends.items() if end is not None]
        choices = [f"{kinds[self.kind]} {' and '.join(limits)}".strip()]
        choices = [choice for choice in choices if choice]
        if self.pair:
            choices.append("a pair of positive numbers")
        choices += map(repr, self.words)
        if self.optional:
            choices.append("None")
        return " or ".join(choices) if len(choices) < 3 else ", ".join(choices)


def _words(*words: str, optional: bool = False) -> _Kind:
    return _Kind(str, words=words, optional=optional)


_COUNT = _Kind(int, least=1)
_COUNT_OR_NONE = _Kind(int, least=1, optional=True)
_SHARE_OR_NONE = _Kind(float, least=0, most=1, optional=True)
_POSITIVE = _Kind(float, above=0)
_NOT_NEGATIVE = _Kind(float, least=0)
_FLAG = _Kind(bool)
_NAME_OR_NONE = _Kind(str, optional=True)

ARGUMENTS: dict[str, _Kind] = {
    # of setup_anndata
    "layer": _NAME_OR_NONE,
    "perturbation_key": _NAME_OR_NONE,
    "dosage_key": _NAME_OR_NONE,
    "perturbation_names_uns_key": _NAME_OR_NONE,
    "combination_delimiter": _NAME_OR_NONE,
    "batch_key": _NAME_OR_NONE,
    "labels_key": _NAME_OR_NONE,
    "size_factor_key": _NAME_OR_NONE,
    "is_count_data": _FLAG,
    "guide_key": _NAME_OR_NONE,
    "guide_threshold": _Kind(float, above=0, optional=True),
    "context_key": _NAME_OR_NONE,
    "donor_key": _NAME_OR_NONE,
    # of constructors
    "n_latent": _COUNT,
    "n_hidden": _Kind(int, least=1),
    "n_layers": _COUNT,
    "dropout_rate": _Kind(float, least=0, below=1),
    "encode_covariates": _FLAG,
    "gene_effects": _FLAG,
    "gene_likelihood": _words("nb", "zinb", "poisson", "normal"),
    "dispersion": _words("gene", "gene-batch"),
    "global_inference": _words("closed_form", "gradient", optional=True),
    "basal_posterior": _words("mean_field", "correlated", "residual", "amortized"),
    "embedding_posterior": _words("mean_field", "correlated", "spike_and_slab"),
    "mask_prior": _Kind(float, above=0, most=1, pair=True),
    "mask_prior_shared_by": _words("all", "latent", "perturbation"),
    "embedding_scale": _POSITIVE,
    "spike_scale": _Kind(float, least=0, words=("learned",)),
    "mask_evidence_cells": _Kind(float, above=0, optional=True),
    "dose_response": _words("linear", "hill"),
    "interaction_prior": _Kind(float, above=0, below=1),
    "context_prior": _Kind(float, above=0, below=1),
    # of train
    "max_epochs": _COUNT_OR_NONE,
    "train_size": _Kind(float, above=0, most=1, optional=True),
    "validation_size": _Kind(float, least=0, below=1, optional=True),
    "batch_size": _COUNT_OR_NONE,
    "early_stopping": _FLAG,
    "early_stopping_patience": _COUNT,
    "early_stopping_warmup_epochs": _Kind(int, least=0),
    "early_stopping_min_delta": _NOT_NEGATIVE,
    "check_val_every_n_epoch": _COUNT_OR_NONE,
    "data_placement": _words("auto", "device", "host", "disk"),
    # of the training plan
    "lr": _NOT_NEGATIVE,
    "global_lr_factor": _NOT_NEGATIVE,
    "eps": _POSITIVE,
    "weight_decay": _NOT_NEGATIVE,
    "weight_precision": _NOT_NEGATIVE,
    "kl_warmup_fraction": _SHARE_OR_NONE,
    "mask_warmup_fraction": _Kind(float, least=0, optional=True),  # above 1: never on
    "min_kl_weight": _NOT_NEGATIVE,
    "max_kl_weight": _NOT_NEGATIVE,
    "n_epochs_kl_warmup": _COUNT_OR_NONE,
    "n_steps_kl_warmup": _COUNT_OR_NONE,
    "kl_global_weight": _NOT_NEGATIVE,
    "global_update_every": _COUNT,
    "n_initialization_cells": _COUNT,
    "clip_factor": _POSITIVE,
    "reduce_lr_on_plateau": _FLAG,
    "lr_patience": _Kind(int, least=0),
    "lr_factor": _Kind(float, above=0, below=1),
    "lr_min": _NOT_NEGATIVE,
    # of methods
    "n_particles": _COUNT,
    "n_samples": _COUNT,
    "n_cells": _COUNT,
    "mc_samples": _COUNT,
    "n_pairs": _COUNT_OR_NONE,
    "n_null": _COUNT_OR_NONE,
    "max_control_share": _Kind(float, above=0, below=1),
    "give_mean": _FLAG,
    "return_mean": _FLAG,
    "return_dist": _FLAG,
    "include_global": _FLAG,
    "representation": _words("full", "basal", "perturbation"),
    "fdr": _Kind(float, above=0, below=1),
    "power": _Kind(float, above=0, below=1),
    "delta": _NOT_NEGATIVE,
    "pseudocount": _POSITIVE,
    "by": _words("effect", "mask"),
    "metric": _words("euclidean", "cosine"),
    "include_null": _FLAG,
    "own_gene": _FLAG,
    "credible_level": _Kind(float, above=0, below=1),
    "library_size": _Kind(float, above=0, words=("latent",), optional=True),
    "seed": _Kind(int, least=0, optional=True),
}


def checked(name: str, value: Any) -> Any:
    """The value of an argument, as a number of Python where it is one.

    Raises
    ------
    ScreenError
        If it is of another kind than the table says, or out of range.

    Examples
    --------
    >>> checked("n_latent", np.int64(3)), checked("dropout_rate", 0)
    (3, 0.0)
    """
    kind = ARGUMENTS.get(name)
    if kind is None or (value is None and kind.optional):
        return value
    if isinstance(value, str) and (value in kind.words or (kind.kind is str and not kind.words)):
        return value
    if kind.kind is bool and isinstance(value, bool | np.bool_):
        return bool(value)
    if kind.pair and isinstance(value, tuple | list | np.ndarray) and len(value) == 2:
        if all(_number(part, float) is not None and 0 < part < np.inf for part in value):
            return tuple(float(part) for part in value)
    elif (number := _number(value, kind.kind)) is not None and _within(number, kind):
        return number
    raise ScreenError(f"{name}={value!r} cannot be used: give {kind}.")


def _number(value: Any, kind: type) -> float | None:
    if kind not in (int, float) or isinstance(value, bool | np.bool_):
        return None
    if not isinstance(value, Integral | Real) or not np.isfinite(number := float(value)):
        return None
    if kind is float:
        return number
    if isinstance(value, Integral):
        return int(value)
    return int(number) if number.is_integer() else None


def _within(number: float, kind: _Kind) -> bool:
    return (
        (kind.above is None or number > kind.above)
        and (kind.least is None or number >= kind.least)
        and (kind.below is None or number < kind.below)
        and (kind.most is None or number <= kind.most)
    )


def settings_of(name: str, value: Any) -> dict[str, Any]:
    """Arguments that are handed on, as a dict of them; none for ``None``."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ScreenError(f"{name}={value!r} cannot be used: give a dict, as {{'lr': 0.002}}.")
    return {argument: checked(argument, given) for argument, given in value.items()}


_ELSEWHERE = {"learning_rate": "lr", "epochs": "max_epochs", "n_epochs": "max_epochs"}


def check_names(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise for names that are no arguments, with the nearest that is.

    Examples
    --------
    >>> check_names(["lr"], ["lr", "eps"], "plan_kwargs")
    """
    known = sorted(known)
    for name in given:
        if name not in known:
            close = [_ELSEWHERE[name]] if _ELSEWHERE.get(name) in known else nearest(name, known)
            hint = (
                f"The nearest is {listed(close)}." if close else f"It takes {listed(known, 30)}."
            )
            raise ScreenError(f"{where} has no {name!r}. {hint}")
