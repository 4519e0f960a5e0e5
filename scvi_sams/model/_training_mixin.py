"""Training with the defaults of this family."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scvi import REGISTRY_KEYS
from scvi.model.base import UnsupervisedTrainingMixin

from scvi_sams.data.field import registered_dosage
from scvi_sams.data.matrices import DiskMatrix, is_on_disk
from scvi_sams.train import SAMSDataSplitter, SAMSTrainingPlan
from scvi_sams.train.global_updates import infer_effects

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scvi_sams.train import DataPlacement

__all__ = ["SAMSTrainingMixin"]

_TARGET_STEPS = 3_000  # where the benchmarks stop to gain
_MIN_EPOCHS = 2
_MAX_EPOCHS = 80  # small screens are overfitted beyond
_WARMUP_SHARE = 0.8  # the longest warm-up of the plan: before its end the bound still rises
_MAX_REFERENCE_CELLS = 2_000
_QUERY_STEPS = 600  # of new perturbations alone, where they need gradients
_QUERY_PASSES, _QUERY_SWEEPS = 5, 10  # where they need none


class SAMSTrainingMixin(UnsupervisedTrainingMixin):
    """``train`` with a number of epochs that follows from a number of steps."""

    _data_splitter_cls = SAMSDataSplitter
    _training_plan_cls = SAMSTrainingPlan

    def train(
        self,
        max_epochs: int | None = None,
        *,
        train_size: float | None = None,
        batch_size: int = 128,
        early_stopping: bool = False,
        data_placement: DataPlacement = "auto",
        plan_kwargs: dict[str, Any] | None = None,
        datasplitter_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Train the model.

        Parameters
        ----------
        max_epochs
            Passes over the training cells. By default as many as make about 3,000 steps, between
            2 and 80. Learning rate, warm-up and the switching on of the masks follow the share
            of them that is done. A query of new perturbations alone (``load_query_data``) takes
            600 steps, or 5 passes where it needs no gradients.
        train_size
            Share of the cells to train on, 0.9 by default; the rest is for validation.
        batch_size
            Cells in a minibatch. Small ones train faster here.
        early_stopping
            Stop when the validation bound no longer improves. Counting starts when masks and
            warm-up are done (``early_stopping_warmup_epochs``).
        data_placement
            ``"device"`` keeps the cells as compact tensors on the device that trains and forms
            minibatches there, ``"host"`` reads each from the AnnData: the fit is the same.
            ``"disk"``, for a backed AnnData, reads shuffled pools of cells, so that the screen may
            be larger than memory: other minibatches, as good a fit. ``"auto"`` is ``"device"``
            where the cells fit, else ``"disk"`` or ``"host"``, where they are. See
            :class:`~scvi_sams.train.SAMSDataSplitter`.
        plan_kwargs
            Arguments of :class:`~scvi_sams.train.SAMSTrainingPlan`.
        datasplitter_kwargs
            Arguments of :class:`~scvi.dataloaders.DataSplitter`, such as ``external_indexing``
            to choose the cells. Ignored, like ``data_placement``, with a ``datamodule``.
        **kwargs
            Further arguments of scvi-tools' ``train`` and :class:`~scvi.train.Trainer`, such as
            ``accelerator``, ``devices``, ``check_val_every_n_epoch``, ``enable_checkpointing``,
            ``gradient_clip_val``, ``precision``, ``ckpt_path`` or ``callbacks``.

        Raises
        ------
        TrainingDivergedError
            If training diverged and could not be mended by restarts.

        Examples
        --------
        >>> model.train(max_epochs=50, early_stopping=True)  # doctest: +SKIP
        """
        datasplitter_kwargs = datasplitter_kwargs or {}
        learns_effects_only = getattr(self, "learns_effects_only_", False)
        needs_gradients = self.module.closed_form is None or self.module.global_parameters()
        if learns_effects_only and not needs_gradients:
            self._infer_effects(max_epochs or _QUERY_PASSES, batch_size)
            return
        if max_epochs is None:
            max_epochs = _epochs_for(
                self._n_training_cells(train_size, datasplitter_kwargs),
                batch_size,
                _QUERY_STEPS if learns_effects_only else _TARGET_STEPS,
            )
        if early_stopping:
            warmup_epochs = math.ceil(_WARMUP_SHARE * max_epochs)
            kwargs.setdefault("early_stopping_warmup_epochs", warmup_epochs)
        self.module.train()  # scvi-tools leaves a module that was trained before as for reading
        super().train(
            max_epochs=max_epochs,
            train_size=train_size,
            batch_size=batch_size,
            early_stopping=early_stopping,
            plan_kwargs=plan_kwargs,
            datasplitter_kwargs={"data_placement": data_placement, **datasplitter_kwargs},
            **kwargs,
        )
        self._keep_reference_cells()

    @torch.no_grad()
    def _infer_effects(self, n_passes: int, batch_size: int) -> None:
        """Infer masks and effects of new perturbations, with every network as it is.

        No gradient is needed: what the cells say of the effects is summed up, then masks and
        effects are solved for; cells with several perturbations ask for further passes.
        """
        module = self.module
        n_cells = self.adata.n_obs
        module.n_training_cells = n_cells
        loader = self._make_data_loader(self.adata, batch_size=batch_size, shuffle=True)
        infer_effects(module, loader, n_passes)
        self.train_indices_, self.validation_indices_ = np.arange(n_cells), np.array([], dtype=int)
        self.test_indices_ = np.array([], dtype=int)
        self.history_: dict[str, pd.DataFrame] = {}
        self.is_trained_ = True
        self._keep_reference_cells()

    def _n_training_cells(
        self, train_size: float | None, datasplitter_kwargs: dict[str, Any]
    ) -> int:
        indices: Sequence[np.ndarray] | None = datasplitter_kwargs.get("external_indexing")
        if indices is not None:
            return len(indices[0])
        return math.ceil((train_size or 0.9) * self.adata.n_obs)

    def _keep_reference_cells(self) -> None:
        """Keep library sizes and covariates of control cells, to predict without the AnnData.

        All training cells stand in where there are no controls. No expression is kept.
        """
        train_indices = np.asarray(self.train_indices)
        dosage = registered_dosage(self.adata_manager)
        is_control = np.asarray(dosage.sum(1)).ravel() == 0
        controls = train_indices[is_control[train_indices]]
        reference = controls if len(controls) else train_indices
        if len(reference) > _MAX_REFERENCE_CELLS:
            reference = np.random.default_rng(0).choice(
                reference, _MAX_REFERENCE_CELLS, replace=False
            )
        self.reference_cells_ = self._cell_covariates(np.sort(reference))

    def _cell_covariates(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Library sizes and covariates of registered cells, each an array with a row a cell."""
        registry = self.adata_manager.data_registry
        keys = (
            REGISTRY_KEYS.SIZE_FACTOR_KEY,
            REGISTRY_KEYS.BATCH_KEY,
            REGISTRY_KEYS.CAT_COVS_KEY,
            REGISTRY_KEYS.CONT_COVS_KEY,
        )
        covariates = {}
        for key in keys:
            if key in registry:
                values = self.adata_manager.get_from_registry(key)
                values = values.to_numpy() if isinstance(values, pd.DataFrame) else values
                covariates[key] = np.asarray(values)[indices].reshape(len(indices), -1)
        if REGISTRY_KEYS.SIZE_FACTOR_KEY not in covariates:
            library = np.ones((len(indices), 1), dtype=np.float32)
            if self.module.is_count_model:
                counts = self.adata_manager.get_from_registry(REGISTRY_KEYS.X_KEY)
                rows = DiskMatrix(counts).rows(indices) if is_on_disk(counts) else counts[indices]
                library = np.asarray(rows.sum(1)).reshape(-1, 1)
            covariates[REGISTRY_KEYS.SIZE_FACTOR_KEY] = library
        return covariates


def _epochs_for(n_cells: int, batch_size: int, n_steps: int) -> int:
    steps_per_epoch = math.ceil(n_cells / batch_size)
    return int(np.clip(math.ceil(n_steps / steps_per_epoch), _MIN_EPOCHS, _MAX_EPOCHS))
