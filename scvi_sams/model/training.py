"""What training needs beyond scvi-tools': how long, a query without gradients, reference cells."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import scvi
import torch
from lightning.pytorch import Trainer as LightningTrainer
from scvi import REGISTRY_KEYS
from scvi.dataloaders import DataSplitter
from scvi.model.base import UnsupervisedTrainingMixin
from scvi.train import Trainer, TrainingPlan, TrainRunner
from torch.utils.data import DataLoader

from scvi_sams._arguments import check_names
from scvi_sams._constants import SAMS_REGISTRY_KEYS
from scvi_sams._exceptions import ScreenError
from scvi_sams.data.matrices import rows_of
from scvi_sams.model.read_outs import controls_of
from scvi_sams.train import SAMSDataSplitter
from scvi_sams.train.global_updates import infer_effects

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

    from scvi_sams.model.samsvae import SAMSVAE


def check_training_names(
    model_class: type[SAMSVAE],
    kwargs: dict[str, Any],
    plan_kwargs: dict[str, Any],
    datasplitter_kwargs: dict[str, Any],
) -> None:
    """Raise for an argument that neither ``train`` nor what it hands them to knows."""

    def names(*functions: Callable[..., Any]) -> set[str]:
        found = {n: p for f in functions for n, p in inspect.signature(f).parameters.items()}
        return {n for n, p in found.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}

    of_plan = names(model_class._training_plan_cls, TrainingPlan) - {"module"}
    of_trainer = names(
        model_class.train, UnsupervisedTrainingMixin.train, TrainRunner, Trainer, LightningTrainer
    )
    of_splitter = names(SAMSDataSplitter, DataSplitter, DataLoader) | {"drop_dataset_tail"}
    check_names(plan_kwargs, of_plan, "plan_kwargs")
    check_names(datasplitter_kwargs, of_splitter, "datasplitter_kwargs")
    misplaced = [name for name in kwargs if name in of_plan and name not in of_trainer]
    if misplaced:
        name = misplaced[0]
        raise ScreenError(
            f"train has no {name!r}, but its plan has: plan_kwargs={{{name!r}: {kwargs[name]!r}}}."
        )
    check_names(kwargs, of_trainer - {"self"} | {"ckpt_path"}, "train")  # which the runner takes


def changed_settings(config: Any) -> dict[str, Any]:
    """Settings of a plan, without the defaults of a config that scvi-tools wrote for its plans.

    Its ``TrainingPlanConfig`` passes on every field, of which Adam's epsilon and the number of
    epochs of the warm-up would spoil a fit here.
    """
    if config is None or isinstance(config, Mapping):
        return dict(config or {})
    defaults = type(config)().to_kwargs()
    given = config.to_kwargs()
    return {name: v for name, v in given.items() if name not in defaults or v != defaults[name]}


_TARGET_STEPS = 3_000  # where the benchmarks stop to gain
_MIN_EPOCHS = 2
_MAX_EPOCHS = 80  # small screens are overfitted beyond
_QUERY_STEPS = 600  # of new perturbations alone, where they need gradients
_QUERY_PASSES = 5  # where they need none
_MAX_REFERENCE_CELLS = 2_000
_COVARIATES = (
    REGISTRY_KEYS.SIZE_FACTOR_KEY,
    REGISTRY_KEYS.BATCH_KEY,
    REGISTRY_KEYS.CAT_COVS_KEY,
    REGISTRY_KEYS.CONT_COVS_KEY,
    SAMS_REGISTRY_KEYS.CONTEXT_KEY,
)


def default_epochs(
    model: SAMSVAE,
    train_size: float | None,
    batch_size: int,
    datasplitter_kwargs: dict[str, Any],
    learns_effects_only: bool,
) -> int:
    """Passes over the training cells that make the usual number of steps."""
    indices = datasplitter_kwargs.get("external_indexing")
    if indices is not None:
        n_cells = len(indices[0])
    elif model.adata is not None:
        n_cells = math.ceil((train_size or 0.9) * model.adata.n_obs)
    else:
        raise ScreenError("The model has no AnnData to count the cells of: give max_epochs.")
    n_steps = _QUERY_STEPS if learns_effects_only else _TARGET_STEPS
    n_epochs = math.ceil(n_steps / math.ceil(n_cells / batch_size))
    return int(np.clip(n_epochs, _MIN_EPOCHS, _MAX_EPOCHS))


def infer_query(model: SAMSVAE, n_passes: int | None, batch_size: int) -> None:
    """Infer masks and effects of new perturbations, with every network as it is.

    No gradient is needed: what the cells say of the effects is summed up, then masks and effects
    are solved for; cells with several perturbations ask for further passes.
    """
    n_cells = model.adata.n_obs
    model.module.n_training_cells = n_cells
    loader = model._make_data_loader(model.adata, batch_size=batch_size, shuffle=True)
    infer_effects(model.module, loader, n_passes or _QUERY_PASSES)
    model.train_indices_, model.validation_indices_ = np.arange(n_cells), np.array([], dtype=int)
    model.test_indices_ = np.array([], dtype=int)
    model.history_ = {}
    model.is_trained_ = True


def tell_of_interruption(model: SAMSVAE, stopped_in: str) -> None:
    """Warn that training ended before its schedules did."""
    effects = model.module.effects
    is_early = effects is not None and not effects.masks_on
    masks = " The masks were not on yet: all effects are zero." if is_early else ""
    warnings.warn(
        f"Training was interrupted in {stopped_in}. What was learned until then is kept, and the "
        f"model can be used, saved or trained on.{masks}",
        UserWarning,
        stacklevel=scvi.settings.warnings_stacklevel,
    )


def reference_cells(model: SAMSVAE) -> dict[str, np.ndarray]:
    """Library sizes and covariates of control cells, to predict without the AnnData.

    All training cells stand in where there are no controls. No expression is kept.
    """
    train_indices = np.asarray(model.train_indices)
    manager = model.adata_manager
    controls = train_indices[controls_of(model)[train_indices]]
    indices = controls if len(controls) else train_indices
    if len(indices) > _MAX_REFERENCE_CELLS:
        indices = np.random.default_rng(0).choice(indices, _MAX_REFERENCE_CELLS, replace=False)
    indices = np.sort(indices)
    kept = {}
    for key in _COVARIATES:
        if key in manager.data_registry:
            values = manager.get_from_registry(key)
            kept[key] = np.asarray(values)[indices].reshape(len(indices), -1)
    if REGISTRY_KEYS.SIZE_FACTOR_KEY not in kept:
        library = np.ones((len(indices), 1), dtype=np.float32)
        if model.module.is_count_model:
            counts = manager.get_from_registry(REGISTRY_KEYS.X_KEY)
            library = np.asarray(rows_of(counts, indices).sum(1)).reshape(-1, 1)
        kept[REGISTRY_KEYS.SIZE_FACTOR_KEY] = library
    return kept


def streamed_reference_cells(
    dataloader: Iterable[dict[str, Tensor]], is_count_model: bool
) -> dict[str, np.ndarray]:
    """The same of the first cells that a data module gives, where there is no AnnData."""
    parts: dict[str, list[np.ndarray]] = {}
    n_read, n_controls, control_parts = 0, 0, []
    for tensors in dataloader:
        x = tensors[REGISTRY_KEYS.X_KEY]
        x = x if x.layout == torch.strided else x.to_dense()
        rows = {key: tensors[key] for key in _COVARIATES if tensors.get(key) is not None}
        library = x.sum(1, keepdim=True) if is_count_model else torch.ones_like(x[:, :1])
        rows.setdefault(REGISTRY_KEYS.SIZE_FACTOR_KEY, library)
        for key, values in rows.items():
            parts.setdefault(key, []).append(values.cpu().numpy())
        control_parts.append((tensors[SAMS_REGISTRY_KEYS.DOSE_KEY] <= 0).all(1).cpu().numpy())
        n_controls += int(control_parts[-1].sum())
        n_read += len(x)
        if n_controls >= _MAX_REFERENCE_CELLS or n_read >= 10 * _MAX_REFERENCE_CELLS:
            break
    is_control = np.concatenate(control_parts)
    kept = np.flatnonzero(is_control if is_control.any() else ~is_control)[:_MAX_REFERENCE_CELLS]
    return {key: np.concatenate(values)[kept] for key, values in parts.items()}
