"""Predicting conditions, measured or not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import anndata as ad
import numpy as np
import pandas as pd
import torch
from scipy import sparse
from scvi import REGISTRY_KEYS
from scvi.utils import track

from scvi_sams._exceptions import ScreenError
from scvi_sams.data.field import registered_dosage
from scvi_sams.model._base import SAMSModel
from scvi_sams.module.base import CellPopulation
from scvi_sams.module.doses import Doses
from scvi_sams.module.likelihood import expected_expression

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

    from scvi_sams.data import ConditionsLike
    from scvi_sams.module.base import GlobalDraws

__all__ = ["PredictionMixin"]


class PredictionMixin(SAMSModel):
    """Cells under any condition, never looking at cells of that condition."""

    @torch.inference_mode()
    def predict(
        self,
        conditions: ConditionsLike,
        n_samples: int = 200,
        basal: Literal["prior", "control"] | AnnData | Sequence[int] = "prior",
        library_size: float | None = None,
        batch: str | None = None,
        return_mean: bool = False,
    ) -> AnnData:
        """Simulate cells under conditions, whether or not they were ever measured.

        Cell k of every condition has the same basal state, library size and covariates, so that
        conditions can be compared cell by cell.

        Parameters
        ----------
        conditions
            Labels (``"A"``, ``"A+B"``, a control label), dicts (``{"A": 1.0, "B": 0.5}``) or a
            dosage matrix (conditions x perturbations).
        n_samples
            Cells of each condition. Ignored if ``basal`` is cells.
        basal
            Where basal states come from: ``"prior"``, ``"control"`` (the posterior of control
            cells of the training data, drawn with replacement), or cells to ask "what if" about:
            an AnnData, or indices into the model's own. Such cells keep their basal state, library
            size and covariates.
        library_size
            Library size (or size factor) of every cell. By default those of control cells.
        batch
            Batch to predict for. By default batches as they occur among control cells.
        return_mean
            Return the mean normalised expression of each condition in place of its cells.

        Returns
        -------
        AnnData of cells x genes with counts in ``X`` and ``obs`` columns ``condition``,
        ``library_size`` and ``basal_cell``; ``layers["normalized_expression"]`` holds each cell's
        expected share of the library. With ``return_mean``, conditions x genes with the mean of
        that share in ``X`` and its standard deviation over cells in ``layers["std"]``.

        Raises
        ------
        UnknownPerturbationError
            If a condition names a perturbation that the model has not seen.
        ScreenError
            If an argument cannot be used with this model.

        Examples
        --------
        >>> cells = model.predict(["KLF1+CEBPA"], n_samples=200)  # doctest: +SKIP
        """
        self._check_if_trained(warn=False)
        dosage, labels = self._parse_distinct_conditions(conditions)
        population, cell_names = self._population(basal, n_samples, batch, library_size)
        n_cells = len(population.basal)
        draws = self._sample_globals(n_cells, dosage)
        values, layer = [], []
        for row in track(range(len(labels)), description="Predict", disable=len(labels) < 20):
            doses = self._doses(dosage, row)
            px = self.module.decode_condition(population, doses, draws, one_draw_a_cell=True)
            scale = expected_expression(px).cpu().numpy()
            if return_mean:
                values.append(scale.mean(0, keepdims=True))
                layer.append(scale.std(0, keepdims=True))
            else:
                values.append(sparse.csr_matrix(px.sample().cpu().numpy()))
                layer.append(scale)
        predicted = ad.AnnData(
            np.concatenate(values) if return_mean else sparse.vstack(values, "csr"),
            obs=(
                pd.DataFrame(index=pd.Index(labels, name="condition"))
                if return_mean
                else self._predicted_obs(labels, population, cell_names)
            ),
            var=pd.DataFrame(index=pd.Index(self.get_var_names())),
            layers={"std" if return_mean else "normalized_expression": np.concatenate(layer)},
        )
        predicted.uns["scvi_sams"] = self._provenance()
        return predicted

    # -- shared steps --------------------------------------------------------------------------

    def _parse_distinct_conditions(
        self, conditions: ConditionsLike
    ) -> tuple[sparse.csr_matrix, list[str]]:
        asked = self._parse_conditions(conditions)
        repeated = [asked.labels[code] for code in np.flatnonzero(asked.n_cells > 1)]
        if repeated:
            raise ScreenError(
                f"Conditions must differ, but {', '.join(repeated)} repeats. Ask for each once."
            )
        return asked.matrix, asked.labels

    def _population(
        self,
        basal: Literal["prior", "control"] | AnnData | Sequence[int],
        n_cells: int,
        batch: str | None,
        library_size: float | None,
    ) -> tuple[CellPopulation, list[str] | None]:
        """Basal states and covariates of cells, with the names of those that are real."""
        names = None
        if n_cells < 1:
            raise ScreenError(f"{n_cells} cells of each condition: at least one is needed.")
        if library_size is not None and not 0 < library_size < np.inf:
            raise ScreenError(f"library_size={library_size!r} must be positive and finite.")
        is_prior = isinstance(basal, str) and basal == "prior"
        if self.adata is None and not (is_prior or isinstance(basal, ad.AnnData)):
            raise ScreenError(
                f"basal={basal!r} needs the cells, and the model was loaded without its AnnData; "
                "use basal='prior' or give an AnnData."
            )
        if is_prior:
            population = self._prior_population(n_cells)
        elif isinstance(basal, str) and basal == "control":
            controls = self._training_controls()
            drawn = controls[torch.randint(len(controls), (n_cells,)).numpy()]
            population, names = self._posterior_population(self.adata, drawn)
        elif isinstance(basal, str):
            raise ScreenError(
                f"basal={basal!r} is unknown; use 'prior', 'control', an AnnData or indices."
            )
        elif isinstance(basal, ad.AnnData):
            population, names = self._posterior_population(basal, np.arange(basal.n_obs))
        else:
            population, names = self._posterior_population(self.adata, np.asarray(basal))
        if batch is not None:
            code = self._batch_code(batch)
            batch_index = torch.full_like(population.library, code, dtype=torch.long)
            population = population._replace(batch_index=batch_index)
        if library_size is not None:
            library = torch.full_like(population.library, library_size)
            population = population._replace(library=library)
        return population, names

    def _prior_population(self, n_cells: int) -> CellPopulation:
        """Basal states from the prior; covariates and library sizes of control cells."""
        reference = self.reference_cells_
        n_reference = len(reference[REGISTRY_KEYS.SIZE_FACTOR_KEY])
        drawn = torch.randint(n_reference, (n_cells,)).numpy()
        basal = self.module.to_network(torch.randn(n_cells, self.module.n_latent))
        tensors = {key: torch.as_tensor(values[drawn]) for key, values in reference.items()}
        return _population(basal, tensors, self.device)

    def _posterior_population(
        self, adata: AnnData | None, indices: np.ndarray
    ) -> tuple[CellPopulation, list[str]]:
        """Basal states drawn from the posterior of given cells, with their own covariates."""
        adata = self._validate_anndata(adata)
        module = self.module
        basal, covariates = [], []
        for tensors in self._make_data_loader(adata, indices=indices):
            outputs = module.inference(**module._get_inference_input(tensors))
            basal.append(module.sample_basal(outputs))
            tensors = {key: value for key, value in tensors.items() if value is not None}
            covariates.append(tensors | {REGISTRY_KEYS.SIZE_FACTOR_KEY: outputs["library"]})
        stacked = {
            key: torch.cat([part[key] for part in covariates]) for key in self.reference_cells_
        }
        names = adata.obs_names[indices].tolist()
        return _population(torch.cat(basal), stacked, self.device), names

    def _training_controls(self) -> np.ndarray:
        """Indices of the control cells that the model was trained on."""
        dosage = registered_dosage(self.adata_manager)
        controls = np.flatnonzero(np.asarray(dosage.sum(1)).ravel() == 0)
        if self.train_indices is not None:
            controls = np.intersect1d(controls, self.train_indices)
        if len(controls) == 0:
            raise ScreenError(
                "basal='control' needs control cells, and the model was trained without any; use "
                "basal='prior' or give the cells."
            )
        return controls

    @property
    def _batch_categories(self) -> list[str]:
        state = self._field_state(REGISTRY_KEYS.BATCH_KEY)
        return [str(category) for category in state["categorical_mapping"]]

    def _batch_code(self, batch: str) -> int:
        categories = self._batch_categories
        if str(batch) not in categories:
            raise ScreenError(
                f"batch={batch!r} is not a batch of this model; it knows {', '.join(categories)}."
            )
        return categories.index(str(batch))

    def _sample_globals(self, n_samples: int, dosage: sparse.csr_matrix) -> GlobalDraws:
        """Draw what conditions (conditions x perturbations) share, of their perturbations only."""
        used = torch.as_tensor(np.unique(dosage.indices), dtype=torch.long, device=self.device)
        return self.module.sample_globals(n_samples, used)

    def _doses(self, dosage: sparse.csr_matrix, row: int) -> Doses:
        """Doses of one condition (of conditions x perturbations) as the module takes them."""
        received = dosage[row]
        columns = (received.indices, received.data) if received.nnz else ([0], [0.0])
        index, dose = (torch.as_tensor(part, device=self.device)[None] for part in columns)
        return Doses(index.long(), dose.float())

    def _predicted_obs(
        self, labels: list[str], population: CellPopulation, cell_names: list[str] | None
    ) -> pd.DataFrame:
        n_cells = len(population.basal)
        cell = np.arange(n_cells) if cell_names is None else np.asarray(cell_names)
        obs = pd.DataFrame(
            {
                "condition": pd.Categorical(np.repeat(labels, n_cells), categories=labels),
                "basal_cell": np.tile(cell, len(labels)),
                "library_size": np.tile(population.library.cpu().numpy().ravel(), len(labels)),
            }
        )
        if population.batch_index is not None:
            codes = population.batch_index.cpu().numpy().ravel()
            batches = np.asarray(self._batch_categories)[codes]
            obs["batch"] = pd.Categorical(np.tile(batches, len(labels)))
        obs.index = [f"{label}_{k}" for label in labels for k in range(n_cells)]
        return obs


def _population(
    basal: torch.Tensor, tensors: dict[str, torch.Tensor], device: torch.device
) -> CellPopulation:
    def on_device(key: str, dtype: torch.dtype) -> torch.Tensor | None:
        return tensors[key].to(device, dtype) if key in tensors else None

    return CellPopulation(
        basal.to(device),
        tensors[REGISTRY_KEYS.SIZE_FACTOR_KEY].to(device, torch.float32),
        on_device(REGISTRY_KEYS.BATCH_KEY, torch.long),
        on_device(REGISTRY_KEYS.CAT_COVS_KEY, torch.long),
        on_device(REGISTRY_KEYS.CONT_COVS_KEY, torch.float32),
    )
