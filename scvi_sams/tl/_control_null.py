"""Control cells made to look like perturbations, to learn how often nothing is called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scvi_sams._arguments import checked
from scvi_sams._exceptions import ScreenError
from scvi_sams.data import Conditions

if TYPE_CHECKING:
    from collections.abc import Iterable

    from anndata import AnnData
    from numpy.typing import NDArray


NULL_PREFIX = "control_null_"
PERMUTED_PREFIX = "permuted_null_"


def add_control_null(
    adata: AnnData,
    perturbation_key: str,
    control: str | Iterable[str],
    *,
    n_null: int | None = None,
    n_cells: int | None = None,
    guide_key: str | None = None,
    max_control_share: float = 0.5,
    combination_delimiter: str | None = "+",
    key_added: str = "perturbation_with_null",
    seed: int = 0,
) -> pd.DataFrame:
    """Give some control cells the labels of perturbations that do nothing.

    They are fitted beside the real perturbations, and so go through everything that these go
    through: the networks, the choice of the latents, the masks. What is called among them is
    false, and calibrates the calls among the real ones
    (:func:`mechanisms`, :func:`active_perturbations`).

    Without ``guide_key`` the cells of a null perturbation are drawn at random, in the numbers of
    cells that the real perturbations have (evenly spaced quantiles of them if there are fewer null
    perturbations). With it, each null perturbation is a whole non-targeting guide: as many cells
    as it has, with what its guide does off target, the stricter null.

    Parameters
    ----------
    adata
        Annotated counts; a column is added to ``obs`` and an entry to ``uns``.
    perturbation_key
        Column of ``obs`` with the labels of the cells.
    control
        Label or labels of control cells.
    n_null
        Number of null perturbations. By default as many as there are perturbations, or as many as
        the control cells allow.
    n_cells
        Cells of each null perturbation, in place of the sizes of real ones. Fewer make more null
        perturbations of the same control cells; as they are noisier, calls become stricter.
    guide_key
        Column of ``obs`` with the guide of each cell.
    max_control_share
        Largest share of the control cells that lose their label.
    combination_delimiter
        What joins the parts of a label.
    key_added
        Column of the new labels, for ``setup_anndata(perturbation_key=...)``.
    seed
        Seed of the draw; other seeds give other cells, for several fits.

    Returns
    -------
    pandas.DataFrame
        A row a null perturbation, with columns ``n_cells`` and, with ``guide_key``, ``guide``.
        Their names begin with ``"control_null_"``. The same is kept in ``uns[key_added]``, with
        the arguments.

    Raises
    ------
    ScreenError
        If a column or the control cells are missing, null perturbations were added before, or
        the control cells do not suffice; the message says for how many they do. Also
        if ``n_null``, ``n_cells`` or ``max_control_share`` is out of its range, or ``n_cells`` is
        given with ``guide_key``.

    Notes
    -----
    Cells that lose the control label no longer serve as controls, and the fit needs those: they
    say where the basal state is. With nine tenths of them relabelled on the screen of Papalexi
    et al. (some 240 cells left in three batches), null perturbations and targets without any
    effect were called; with half of them, none were. Where a null perturbation is called in
    earnest, look there first.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(control_fraction=0.4)
    >>> null = scvi_sams.tl.add_control_null(adata, "perturbation", "control", n_null=5)
    >>> null.index[0], len(null)
    ('control_null_001', 5)
    >>> scvi_sams.SAMSVAE.setup_anndata(
    ...     adata, layer="counts", perturbation_key="perturbation_with_null", control="control"
    ... )
    """
    n_null, seed = checked("n_null", n_null), checked("seed", seed)
    n_cells = None if n_cells is None else checked("n_cells", n_cells)
    max_control_share = checked("max_control_share", max_control_share)
    if n_cells is not None and guide_key is not None:
        raise ScreenError(f"n_cells={n_cells} is not for whole guides: leave out one of the two.")
    for key in (perturbation_key, guide_key):
        if key is not None and key not in adata.obs:
            raise ScreenError(
                f"adata.obs has no column {key!r}; its columns are "
                f"{', '.join(map(repr, adata.obs.columns))}."
            )
    labels = adata.obs[perturbation_key]
    conditions = Conditions.from_labels(labels, control, combination_delimiter)
    dosage, names = conditions.cell_matrix, conditions.perturbations
    if already := null_perturbations(names):
        raise ScreenError(
            f"adata.obs[{perturbation_key!r}] holds {already[0]!r} already: give the column of "
            "the original labels."
        )
    controls = np.flatnonzero(dosage.getnnz(axis=1) == 0)
    budget = int(max_control_share * len(controls))
    rng = np.random.default_rng(seed)
    if guide_key is None:
        sizes = np.sort(dosage.getnnz(axis=0))
        sizes = sizes[sizes > 0]
        if n_cells is not None:
            n_null = max(1, budget // n_cells) if n_null is None else n_null
            sizes = np.array([n_cells])
        null_cells = _drawn_cells(controls, sizes, n_null, budget, rng)
        guides = None
    else:
        guide = adata.obs[guide_key].astype(str).to_numpy()[controls]
        null_cells, guides = _cells_of_guides(controls, guide, n_null, budget, rng)

    width = max(3, len(str(len(null_cells))))
    null_names = [f"{NULL_PREFIX}{number:0{width}d}" for number in range(1, len(null_cells) + 1)]
    relabelled = labels.astype(str).to_numpy(dtype=object)
    for name, cells in zip(null_names, null_cells, strict=True):
        relabelled[cells] = name
    table = pd.DataFrame(
        {"n_cells": [len(cells) for cells in null_cells]},
        index=pd.Index(null_names, name="perturbation"),
    )
    if guides is not None:
        table["guide"] = guides
    adata.obs[key_added] = pd.Categorical(relabelled)
    record: dict[str, Any] = {
        "perturbation_key": perturbation_key,
        "max_control_share": max_control_share,
        "seed": seed,
        "n_controls_left": len(controls) - int(table["n_cells"].sum()),
        "null": table.reset_index(),
    }
    adata.uns[key_added] = record | ({} if guide_key is None else {"guide_key": guide_key})
    return table


def null_perturbations(names: Iterable[str]) -> list[str]:
    """Those of the names that :func:`add_control_null` or :func:`add_permuted_null` gave."""
    return [name for name in names if name.startswith((NULL_PREFIX, PERMUTED_PREFIX))]


def _drawn_cells(
    controls: NDArray[np.int64],
    real_sizes: NDArray[np.int64],
    n_null: int | None,
    budget: int,
    rng: np.random.Generator,
) -> list[NDArray[np.int64]]:
    """Disjoint draws of control cells, of the sizes of real perturbations."""
    if len(real_sizes) == 0:
        raise ScreenError("No cell has a perturbation, so there is none whose size to match.")
    most = min(len(real_sizes) if n_null is None else n_null, max(budget, 1))
    fitting = (n for n in range(most, 0, -1) if _matched_sizes(real_sizes, n).sum() <= budget)
    n_fitting = next(fitting, 0)
    if n_fitting == 0 or (n_null is not None and n_fitting < n_null):
        raise ScreenError(
            f"The {len(controls)} control cells suffice for {n_fitting} null perturbations of the "
            f"sizes wanted (median {int(np.median(real_sizes))} cells), with "
            f"{budget} of them to give away: lower n_null, raise max_control_share, or give the "
            "guides of the control cells as guide_key. Where no cell is free of guides, see "
            "add_permuted_null."
        )
    sizes = _matched_sizes(real_sizes, n_fitting)
    drawn = rng.permutation(controls)[: sizes.sum()]
    return np.split(drawn, np.cumsum(sizes)[:-1])


def _matched_sizes(real_sizes: NDArray[np.int64], n_null: int) -> NDArray[np.int64]:
    """Sizes that occur, spread as all of them are: the sizes themselves if there are as many."""
    levels = (np.arange(n_null) + 0.5) / n_null
    return np.quantile(real_sizes, levels, method="inverted_cdf").astype(np.int64)


def _cells_of_guides(
    controls: NDArray[np.int64],
    guide: NDArray[Any],
    n_null: int | None,
    budget: int,
    rng: np.random.Generator,
) -> tuple[list[NDArray[np.int64]], list[str]]:
    """All cells of some guides of control cells, drawn at random, as many as fit."""
    names, sizes = np.unique(guide, return_counts=True)
    chosen: list[str] = []
    remaining = budget
    for k in rng.permutation(len(names)):
        if sizes[k] <= remaining and (n_null is None or len(chosen) < n_null):
            chosen.append(str(names[k]))
            remaining -= int(sizes[k])
    if not chosen or (n_null is not None and len(chosen) < n_null):
        raise ScreenError(
            f"{len(chosen)} of the {len(names)} guides of the control cells fit into the "
            f"{budget} cells to give away: lower n_null or raise max_control_share."
        )
    chosen.sort()
    return [controls[guide == name] for name in chosen], chosen
