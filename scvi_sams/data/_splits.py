"""Splits of a screen by cells, batches and doses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from scvi_sams._exceptions import ScreenError

from ._cell_conditions import cell_conditions, obs_column
from ._messages import listed
from ._split_column import check_share, choose_names, random_share, write_split

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from anndata import AnnData
    from numpy.random import Generator
    from numpy.typing import NDArray

    from ._cell_conditions import CellConditions

__all__ = ["divide_training", "split_batches", "split_cells", "split_doses"]


def split_cells(
    adata: AnnData,
    validation_size: float = 0.16,
    test_size: float = 0.2,
    *,
    stratify_by: str | None = None,
    seed: int = 0,
    key_added: str = "split",
) -> pd.Series:
    """Split cells at random, whatever they received.

    Every condition is seen in training: such a split asks whether a model describes cells, not
    whether it predicts. The default shares are those of the Replogle screen in Bereket and
    Karaletsos (NeurIPS 2023).

    Parameters
    ----------
    adata
        The screen, cells x genes.
    validation_size, test_size
        Shares of the cells; the rest is for training.
    stratify_by
        Column of `adata.obs` of whose every value each part gets its share.
    seed
        Seed of the draw.
    key_added
        Column of `adata.obs` to write; the record goes to ``adata.uns["scvi_sams_splits"]``.

    Returns
    -------
    The column: ``"train"``, ``"validation"`` or ``"test"`` for each cell.

    Raises
    ------
    ScreenError
        If a column is absent, `adata` is a view, or no cell is left for training.
    ValueError
        If the shares are not between 0 and 1, or add up to more than 1.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=100)
    >>> scvi_sams.data.split_cells(adata).value_counts().to_dict()
    {'train': 64, 'test': 20, 'validation': 16, 'unused': 0}
    """
    check_share(test_size, "test_size")
    check_share(validation_size, "validation_size")
    if validation_size + test_size > 1:
        raise ValueError(
            f"validation_size={validation_size} and test_size={test_size} add up to more than 1."
        )
    test_rng, validation_rng = np.random.default_rng(seed).spawn(2)
    strata = np.zeros(adata.n_obs, dtype=np.intp)
    if stratify_by is not None:
        strata = pd.factorize(obs_column(adata, stratify_by))[0]
    labels = np.where(random_share(strata, test_size, test_rng), "test", "train").astype(object)
    if test_size < 1:
        divide_training(labels, validation_size / (1 - test_size), validation_rng, strata)
    return write_split(
        adata,
        labels,
        key_added,
        kind="split_cells",
        seed=seed,
        arguments={
            "validation_size": validation_size,
            "test_size": test_size,
            "stratify_by": stratify_by,
        },
        held_out_by="cell",
    )


def split_batches(
    adata: AnnData,
    batch_key: str,
    test_batches: float | Sequence[str] = 0.2,
    *,
    perturbation_key: str | None = None,
    control: str | Iterable[str] | None = None,
    combination_delimiter: str | None = "+",
    train_on_controls: bool = False,
    validation_size: float = 0.1,
    seed: int = 0,
    key_added: str = "split",
) -> pd.Series:
    """Hold out batches, or any other context such as cell lines or donors.

    Parameters
    ----------
    adata
        The screen, cells x genes.
    batch_key
        Column of `adata.obs` with the batch of each cell.
    test_batches
        Names of the batches to hold out, or their share.
    perturbation_key, control, combination_delimiter
        As in ``setup_anndata``; needed for `train_on_controls` only.
    train_on_controls
        Whether to train on the control cells of the batches held out: what the effects of known
        perturbations are in a context of which the unperturbed cells are known.
    validation_size
        Share of the cells not held out that is for validation.
    seed, key_added
        As for :func:`split_cells`.

    Returns
    -------
    The column, as of :func:`split_cells`.

    Raises
    ------
    ScreenError
        As :func:`split_cells`, or if a batch is not there, a cell has none, or controls are to
        be trained on and are not described.
    ValueError
        If a share is not between 0 and 1.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=100)
    >>> column = scvi_sams.data.split_batches(adata, "replicate", ["replicate_2"])
    >>> adata.obs.loc[column == "test", "replicate"].unique().tolist()
    ['replicate_2']
    """
    check_share(validation_size, "validation_size")
    choice_rng, validation_rng = np.random.default_rng(seed).spawn(2)
    batches = obs_column(adata, batch_key)
    if (missing := batches.isna().to_numpy()).any():
        raise ScreenError(
            f"Cells without a value in obs[{batch_key!r}]: {listed(adata.obs_names[missing])}. "
            "Drop them or fill it in."
        )
    batches = batches.astype(str)
    held_out = choose_names(
        test_batches, sorted(batches.unique()), "batches", "test_batches", choice_rng
    )
    is_test = batches.isin(held_out).to_numpy()
    if train_on_controls:
        if perturbation_key is None or control is None:
            raise ScreenError(
                "train_on_controls=True needs to know the control cells: give `perturbation_key` "
                "and `control`."
            )
        conditions = cell_conditions(adata, perturbation_key, control, combination_delimiter)
        is_test &= ~conditions.is_control
    labels = np.where(is_test, "test", "train").astype(object)
    divide_training(labels, validation_size, validation_rng)
    return write_split(
        adata,
        labels,
        key_added,
        kind="split_batches",
        seed=seed,
        arguments={
            "batch_key": batch_key,
            "test_batches": test_batches,
            "train_on_controls": train_on_controls,
            "validation_size": validation_size,
            **perturbation_arguments(perturbation_key, control, combination_delimiter),
        },
        held_out_by="batch",
        held_out=held_out,
    )


def split_doses(
    adata: AnnData,
    perturbation_key: str,
    control: str | Iterable[str] | None,
    dosage_key: str,
    test_doses: Literal["highest", "lowest"] | Sequence[float] = "highest",
    *,
    combination_delimiter: str | None = "+",
    validation_size: float = 0.1,
    seed: int = 0,
    key_added: str = "split",
) -> pd.Series:
    """Hold out doses of perturbations whose other doses are seen.

    Parameters
    ----------
    adata
        The screen, cells x genes.
    perturbation_key, control, combination_delimiter
        As in ``setup_anndata``.
    dosage_key
        Column of `adata.obs` with doses, as in ``setup_anndata``.
    test_doses
        ``"highest"`` or ``"lowest"``: that dose of each perturbation that has several, to
        extrapolate. Or doses, in the unit of the column, of any perturbation.
    validation_size
        Share of the cells not held out that is for validation.
    seed, key_added
        As for :func:`split_cells`.

    Returns
    -------
    The column, as of :func:`split_cells`. A combination is held out if one of its doses is.

    Raises
    ------
    ScreenError
        As :func:`split_cells`, or if no cell has one of the doses, or no perturbation has two.
    ValueError
        If a share is not between 0 and 1.

    Examples
    --------
    >>> import anndata, pandas as pd
    >>> from scvi_sams.data import split_doses
    >>> obs = pd.DataFrame({"drug": ["DMSO", "A", "A", "A"], "dose": [0, 1, 10, 100]})
    >>> obs.index = obs.index.astype(str)
    >>> adata = anndata.AnnData(obs=obs)
    >>> split_doses(adata, "drug", "DMSO", "dose", validation_size=0).tolist()
    ['train', 'train', 'train', 'test']
    """
    check_share(validation_size, "validation_size")
    conditions = cell_conditions(
        adata, perturbation_key, control, combination_delimiter, dosage_key
    )
    doses_of: dict[str, set[float]] = {}
    for row in conditions.doses:
        for name, dose in row.items():
            doses_of.setdefault(name, set()).add(dose)
    if isinstance(test_doses, str):
        if test_doses not in {"highest", "lowest"}:
            raise ValueError(f"test_doses={test_doses!r}: 'highest', 'lowest', or the doses.")
        extreme = max if test_doses == "highest" else min
        held_out = {(name, extreme(doses)) for name, doses in doses_of.items() if len(doses) > 1}
        if not held_out:
            raise ScreenError(
                f"No perturbation has two doses in obs[{dosage_key!r}], so that none can be held "
                "out while another is seen."
            )
    else:
        wanted = {float(np.float32(dose)) for dose in test_doses}
        held_out = {(name, d) for name, doses in doses_of.items() for d in doses & wanted}
        if absent := sorted(wanted - {dose for _, dose in held_out}):
            raise ScreenError(
                f"No cell has the doses {', '.join(f'{dose:g}' for dose in absent)} in "
                f"obs[{dosage_key!r}]."
            )
    is_held_out = np.array([bool(held_out & row.items()) for row in conditions.doses])
    labels = np.where(is_held_out[conditions.codes], "test", "train").astype(object)
    validation_rng = np.random.default_rng(seed)
    divide_training(labels, validation_size, validation_rng)
    return write_split(
        adata,
        labels,
        key_added,
        kind="split_doses",
        seed=seed,
        arguments={
            "test_doses": test_doses,
            "dosage_key": dosage_key,
            "validation_size": validation_size,
            **perturbation_arguments(perturbation_key, control, combination_delimiter),
        },
        held_out_by="dose",
        held_out=[f"{name}:{dose:g}" for name, dose in held_out],
    )


def divide_training(
    labels: NDArray[np.object_],
    validation_size: float,
    rng: Generator,
    strata: NDArray[np.intp] | None = None,
) -> None:
    """Turn a share of the cells to train on into cells to validate on, in place."""
    if strata is None:
        strata = np.zeros(len(labels), dtype=np.intp)
    is_training = labels == "train"
    drawn = random_share(np.where(is_training, strata, -1), validation_size, rng)
    labels[is_training & drawn] = "validation"


def perturbation_arguments(
    perturbation_key: str | None,
    control: str | Iterable[str] | None,
    combination_delimiter: str | None,
) -> dict[str, object]:
    """Arguments of a split that say what each cell received, for its record."""
    return {
        "perturbation_key": perturbation_key,
        "control": control,
        "combination_delimiter": combination_delimiter,
    }


def labels_by_condition(
    conditions: CellConditions, label_of_code: dict[int, str], default: str = "train"
) -> NDArray[np.object_]:
    """Label of each cell from that of its condition."""
    by_code = np.full(len(conditions.names), default, dtype=object)
    for code, label in label_of_code.items():
        by_code[code] = label
    return by_code[conditions.codes]
