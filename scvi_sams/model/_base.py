"""What the parts of a model class share."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import scvi

from scvi_sams._constants import SAMS_REGISTRY_KEYS
from scvi_sams.data import Conditions, PerturbationField

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import torch
    from anndata import AnnData
    from scvi.data import AnnDataManager

    from scvi_sams.data import ConditionsLike
    from scvi_sams.module.base import PerturbationVAEModule
    from scvi_sams.module.posteriors import EffectsPosterior

__all__ = ["SAMSModel"]


class SAMSModel:
    """Base of the mixins: what they use of scvi-tools' model class, and their common steps."""

    # Declared, not defined: scvi-tools' classes come later among the bases.
    module: PerturbationVAEModule
    adata: AnnData
    adata_manager: AnnDataManager
    registry: dict[str, Any]
    summary_stats: Any
    device: torch.device
    train_indices: np.ndarray | None
    reference_cells_: dict[str, np.ndarray]
    get_var_names: Callable[[], np.ndarray]
    _check_if_trained: Callable[..., None]
    _make_data_loader: Callable[..., Any]
    _validate_anndata: Callable[[AnnData | None], AnnData]

    @property
    def perturbation_names(self) -> list[str]:
        """Names of the perturbations the model knows, in the order of every matrix."""
        return list(self._perturbation_registry[PerturbationField.COLUMN_NAMES_KEY])

    @property
    def _latent_names(self) -> list[str]:
        return [f"latent_{latent}" for latent in range(self.module.n_latent)]

    @property
    def _delimiter(self) -> str:
        return self._perturbation_registry[PerturbationField.DELIMITER_KEY] or "+"

    def _require_effects(self, method: str) -> EffectsPosterior:
        """The effects of a trained model; raise if perturbations do not act by a latent shift."""
        self._check_if_trained(warn=False)
        effects = self.module.effects
        if effects is None:
            raise NotImplementedError(
                f"{method}: in {type(self).__name__} perturbations act through the networks, not "
                "by a latent shift. See get_average_treatment_effect() for what they do to genes, "
                "or use SAMSVAE or CPAVAE."
            )
        return effects

    @property
    def _perturbation_registry(self) -> dict[str, Any]:
        return self._field_state(SAMS_REGISTRY_KEYS.PERTURBATION_KEY)

    def _field_state(self, registry_key: str) -> dict[str, Any]:
        """State of a registered field, with or without the AnnData."""
        return self.registry["field_registries"][registry_key]["state_registry"]

    def _parse_conditions(self, conditions: ConditionsLike) -> Conditions:
        """Read conditions that a user asks for."""
        registry = self._perturbation_registry
        return Conditions.from_request(
            conditions,
            self.perturbation_names,
            registry[PerturbationField.CONTROL_KEY],
            registry[PerturbationField.DELIMITER_KEY],
        )

    def _provenance(self) -> dict[str, Any]:
        """What every file written from a prediction says of its origin."""
        packages = ("scvi-sams", "scvi-tools", "torch", "anndata")
        return {
            "model": type(self).__name__,
            "seed": -1 if scvi.settings.seed is None else scvi.settings.seed,
            "python": platform.python_version(),
            **{package.replace("-", "_"): version(package) for package in packages},
        }
