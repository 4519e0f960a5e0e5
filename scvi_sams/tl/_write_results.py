"""What a model found, written where scanpy looks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from scvi_sams._exceptions import ScreenError
from scvi_sams.model.efficacy import why_no_efficacy
from scvi_sams.model.read_outs import provenance
from scvi_sams.tl._gene_programs import gene_programs

if TYPE_CHECKING:
    from anndata import AnnData

    from scvi_sams.model import SAMSVAE
    from scvi_sams.model.counterfactual import Counterfactual


def write_results(
    model: SAMSVAE,
    adata: AnnData | None = None,
    key: str = "sams",
    move: float | Literal["typical"] = 1.0,
    batch_size: int | None = None,
    *,
    counterfactual: Counterfactual | None = None,
) -> None:
    """Write latent states, gene programmes, masks and effects into an AnnData.

    Everything survives ``adata.write_h5ad``. With ``key="sams"``:

    * ``obsm["X_sams"]``: latent states (``sc.pp.neighbors(adata, use_rep="X_sams")``),
      cells x latents
    * ``obsm["X_sams_basal"]``, ``obsm["X_sams_perturbation"]``: what the cell would be without its
      perturbations, and the shift; where perturbations act by a shift
    * ``obs["sams_perturbed_probability"]``: probability that all perturbations of the cell took
      (``get_perturbed_probability``), NaN for controls; where the model has such
    * ``varm["sams_programs"]``: mean effects of latents on genes, genes x latents
      (:func:`gene_programs`); NaN for genes that the model does not know
    * ``uns["sams"]``: ``latents`` (DataFrame, the ``obs`` of :func:`gene_programs`),
      ``perturbation_effect`` and ``perturbation_mask`` (DataFrames, perturbations x latents, where
      there are such), ``programs`` (how they were made) and ``provenance`` (model, versions)

    Parameters
    ----------
    model
        A trained model.
    adata
        AnnData to write to and whose cells to describe, the model's own by default. Its genes are
        matched by name.
    key
        Start of the names.
    move, counterfactual
        See :func:`gene_programs`.
    batch_size
        Cells in a minibatch.

    Raises
    ------
    ScreenError
        If ``adata`` is a view, ``key`` cannot name anything, there is no AnnData, or it lacks a
        gene of the model.
    NotImplementedError
        For ``move="typical"`` where perturbations do not act by a shift.

    Examples
    --------
    >>> scvi_sams.tl.write_results(model, adata)  # doctest: +SKIP
    >>> sc.pp.neighbors(adata, use_rep="X_sams")  # doctest: +SKIP
    """
    model._check_if_trained(warn=False)
    adata = model.adata if adata is None else adata
    if adata is None:
        raise ScreenError("The model was loaded without its AnnData: give one as adata.")
    if adata.is_view:
        raise ScreenError("adata is a view, which cannot be written to: give adata.copy().")
    if not key or "/" in key:
        raise ScreenError(f"key={key!r} cannot start a name: give a word, such as 'sams'.")
    genes = list(map(str, model.get_var_names()))
    if missing := [gene for gene in genes if gene not in adata.var_names]:
        raise ScreenError(f"adata lacks the gene {missing[0]!r} of the model.")
    # All that may fail first: an AnnData with half of the results would mislead.
    programs = gene_programs(model, move, counterfactual=counterfactual)
    has_shifts = model.module.effects is not None
    states = {"": "full"}
    if has_shifts:
        states |= {"_basal": "basal", "_perturbation": "perturbation"}
    # Genes that the model has not are no obstacle here, as results are written by name.
    same_genes = adata if set(genes) == set(adata.var_names) else adata[:, genes].copy()
    latent = {
        suffix: model.get_latent_representation(
            same_genes, representation=representation, batch_size=batch_size
        )
        for suffix, representation in states.items()
    }
    took = None
    if why_no_efficacy(model) is None and (model.adata is not None or model.efficacy_ is not None):
        took = model.get_perturbed_probability(same_genes)["probability"]
        took = took.groupby(level=0).prod().reindex(adata.obs_names)
    made = programs.uns["scvi_sams"]
    found: dict[str, Any] = {
        "latents": programs.obs.copy(),
        "programs": {name: made[name] for name in ("seed", "move", "credible_level", "units")},
        "provenance": provenance(model),
    }
    if has_shifts:
        found["perturbation_effect"] = model.get_perturbation_effect()
        if model.module.effects.sparse:
            found["perturbation_mask"] = model.get_perturbation_mask()
    table = programs.to_df().T.reindex(adata.var_names)
    table.columns.name = None  # which an h5ad does not keep
    for suffix, values in latent.items():
        adata.obsm[f"X_{key}{suffix}"] = np.asarray(values, dtype=np.float32)
    if took is not None:
        adata.obs[f"{key}_perturbed_probability"] = took.to_numpy(np.float32)
    adata.varm[f"{key}_programs"] = table
    adata.uns[key] = found
