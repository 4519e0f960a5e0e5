"""Splits of a screen into cells to train on, to choose by, and to test on."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import pandas as pd

from scvi_sams._exceptions import ScreenError, listed, nearest
from scvi_sams.data.conditions import Conditions, obs_column

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from anndata import AnnData
    from numpy.random import Generator
    from numpy.typing import NDArray


SPLIT_LABELS = ("train", "validation", "test", "unused")
"""Labels of a split: gradients, choices during training, the final figures, and cells left out."""

SPLITS_UNS_KEY = "scvi_sams_splits"
"""Where ``adata.uns`` keeps, for each split column, how it was made."""

HeldOutBy: TypeAlias = Literal["cell", "condition", "perturbation", "batch", "dose"]
"""What a split keeps out of training."""


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
    whether it predicts. The default shares are those of Bereket and Karaletsos (NeurIPS 2023).

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
        Column of `adata.obs` to write. How it was made goes to ``adata.uns["scvi_sams_splits"]``.

    Returns
    -------
    pandas.Series
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
    >>> scvi_sams.evaluation.split_cells(adata).value_counts().to_dict()
    {'train': 64, 'test': 20, 'validation': 16, 'unused': 0}
    """
    call = dict(locals())
    _check_shares(call)
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
    return _write(call, "split_cells", labels, "cell")


def split_conditions(
    adata: AnnData,
    perturbation_key: str,
    control: str | Iterable[str] | None,
    test_conditions: float | Sequence[str] = 0.2,
    validation_conditions: float | Sequence[str] | None = None,
    *,
    combination_delimiter: str | None = "+",
    test_controls: float = 0.2,
    validation_size: float = 0.1,
    seed: int = 0,
    key_added: str = "split",
) -> pd.Series:
    """Hold out conditions: all cells of each are for testing.

    A single perturbation that is held out may still be seen in pairs, and its pairs in training;
    :func:`split_perturbations` holds out those too.

    Parameters
    ----------
    adata
        The screen, cells x genes.
    perturbation_key, control, combination_delimiter
        As in ``setup_anndata``.
    test_conditions
        Conditions to hold out (``"A"``, ``"A+B"``, in any order of the parts), or their share.
    validation_conditions
        Conditions to validate on, or their share of all. By default validation takes
        `validation_size` of the cells of the conditions that are trained on.
    test_controls
        Share of the control cells to hold out too, to score effects against: noise of controls
        that were trained on is in the predictions, and would look like agreement.
    validation_size
        Share of the cells not held out that is for validation, without `validation_conditions`.
    seed, key_added
        As for :func:`split_cells`.

    Returns
    -------
    pandas.Series
        The column: ``"train"``, ``"validation"`` or ``"test"`` for each cell.

    Raises
    ------
    ScreenError
        If labels cannot be read, a condition has no cells, is a control or is named for both
        parts, `adata` is a view, or no cell is left for training.
    ValueError
        If a share is not between 0 and 1.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=500)
    >>> column = scvi_sams.evaluation.split_conditions(adata, "perturbation", "control", ["P001"])
    >>> adata.obs.loc[column == "test", "perturbation"].unique().tolist()
    ['control', 'P001']
    """
    call = dict(locals())
    test_rng, choice_rng, validation_rng, control_rng = np.random.default_rng(seed).spawn(4)
    found = Conditions.from_obs(adata, perturbation_key, control, combination_delimiter)
    left = [label for label, parts in zip(found.labels, found.parts, strict=True) if parts]
    test = _chosen(test_conditions, left, "conditions", "test_conditions", test_rng, found)
    label_of = dict.fromkeys(test, "test")
    if validation_conditions is not None:
        left = [label for label in left if label not in label_of]
        names = _chosen(
            validation_conditions, left, "conditions", "validation_conditions", choice_rng, found
        )
        if both := sorted(label_of.keys() & names):
            raise ScreenError(
                f"{both[0]!r} is named in `test_conditions` and in `validation_conditions`: leave "
                "it out of one."
            )
        label_of |= dict.fromkeys(names, "validation")
    rngs = control_rng, validation_rng if validation_conditions is None else None
    return _write_conditions(call, "split_conditions", found, label_of, rngs, "condition", test)


def split_perturbations(
    adata: AnnData,
    perturbation_key: str,
    control: str | Iterable[str] | None,
    test_perturbations: float | Sequence[str] = 0.2,
    *,
    combination_delimiter: str | None = "+",
    test_controls: float = 0.2,
    validation_size: float = 0.1,
    seed: int = 0,
    key_added: str = "split",
) -> pd.Series:
    """Hold out perturbations, alone and in every combination: unseen in training.

    A model without features of perturbations cannot predict these; see ``load_query_data`` for
    what it can learn of them later.

    Parameters
    ----------
    test_perturbations
        Names of the perturbations to hold out, or their share.
    adata, perturbation_key, control, combination_delimiter, test_controls, validation_size
        As for :func:`split_conditions`, as are ``seed`` and ``key_added``.

    Returns
    -------
    pandas.Series
        As of :func:`split_conditions`; cells with one of the perturbations are ``"test"``.

    Raises
    ------
    ScreenError, ValueError
        As :func:`split_conditions`.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=500)
    >>> _ = scvi_sams.evaluation.split_perturbations(adata, "perturbation", "control", ["P001"])
    >>> adata.obs.loc[adata.obs["split"] != "test", "perturbation"].str.contains("P001").any()
    np.False_
    """
    call = dict(locals())
    choice_rng, validation_rng, control_rng = np.random.default_rng(seed).spawn(3)
    found = Conditions.from_obs(adata, perturbation_key, control, combination_delimiter)
    names = _chosen(
        test_perturbations, found.perturbations, "perturbations", "test_perturbations", choice_rng
    )
    held_out = zip(found.labels, found.parts, strict=True)
    label_of = {label: "test" for label, parts in held_out if parts.keys() & set(names)}
    rngs = control_rng, validation_rng
    return _write_conditions(
        call, "split_perturbations", found, label_of, rngs, "perturbation", names
    )


def split_pairs(
    adata: AnnData,
    perturbation_key: str,
    control: str | Iterable[str] | None,
    n_seen: Literal[0, 1, 2] = 2,
    held_out: float | Sequence[str] = 0.25,
    *,
    combination_delimiter: str | None = "+",
    test_controls: float = 0.2,
    validation_size: float = 0.1,
    seed: int = 0,
    key_added: str = "split",
) -> pd.Series:
    """Hold out pairs of which no, one or both perturbations are seen in training.

    The three strata of Roohani, Huang and Leskovec (GEARS, Nature Biotechnology 2024), each a
    split of its own; :func:`count_seen_perturbations` gives the stratum under any split.

    Parameters
    ----------
    n_seen
        Perturbations of a test pair that are seen in training. With 2, pairs are held out of
        which both perturbations are measured alone. With 0 or 1, perturbations are held out: pairs
        of which that many are left are for testing, other cells with one of them are unused.
    held_out
        Names, or a share: with ``n_seen=2`` of those pairs, otherwise of the perturbations that
        occur in pairs.
    adata, perturbation_key, control, combination_delimiter, test_controls, validation_size
        As for :func:`split_conditions`, as are ``seed`` and ``key_added``.

    Returns
    -------
    pandas.Series
        The column: ``"train"``, ``"validation"``, ``"test"`` or ``"unused"`` for each cell.

    Raises
    ------
    ScreenError
        As :func:`split_conditions`, or if no pair qualifies.
    ValueError
        If a share is not between 0 and 1, or `n_seen` is not 0, 1 or 2.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=500)
    >>> column = scvi_sams.evaluation.split_pairs(adata, "perturbation", "control", n_seen=2)
    >>> adata.obs.loc[column == "test", "perturbation"].nunique()
    3
    """
    call = dict(locals())
    if n_seen not in {0, 1, 2}:
        raise ValueError(f"n_seen={n_seen}: a pair has 0, 1 or 2 perturbations that are seen.")
    choice_rng, validation_rng, control_rng = np.random.default_rng(seed).spawn(3)
    found = Conditions.from_obs(adata, perturbation_key, control, combination_delimiter)
    parts_of = dict(zip(found.labels, found.parts, strict=True))
    singles = {next(iter(parts)) for parts in parts_of.values() if len(parts) == 1}
    pairs = {label: set(parts) for label, parts in parts_of.items() if len(parts) == 2}
    if n_seen == 2:
        qualified = sorted(label for label, parts in pairs.items() if parts <= singles)
        what = "pairs of single perturbations"
        names = _chosen(held_out, qualified, what, "held_out", choice_rng, found)
        if faulty := [name for name in names if name not in qualified]:
            raise ScreenError(
                f"{faulty[0]!r} is no pair of which both perturbations are measured alone."
            )
        label_of = dict.fromkeys(names, "test")
    else:
        in_pairs = sorted(set().union(*pairs.values()))
        names = _chosen(held_out, in_pairs, "perturbations of pairs", "held_out", choice_rng)
        label_of = {}
        for label, parts in parts_of.items():
            if unseen := parts.keys() & set(names):
                is_test = label in pairs and len(unseen) == 2 - n_seen
                label_of[label] = "test" if is_test else "unused"
    if "test" not in label_of.values():
        raise ScreenError(
            f"No pair has {n_seen} seen perturbations when {', '.join(names) or 'none'} are held "
            "out: hold out more, or name others."
        )
    rngs = control_rng, validation_rng
    by: HeldOutBy = "condition" if n_seen == 2 else "perturbation"
    return _write_conditions(call, "split_pairs", found, label_of, rngs, by, names)


def split_doses(
    adata: AnnData,
    perturbation_key: str,
    control: str | Iterable[str] | None,
    dosage_key: str,
    test_doses: Literal["highest", "lowest"] | Sequence[float] = "highest",
    *,
    combination_delimiter: str | None = "+",
    test_controls: float = 0.2,
    validation_size: float = 0.1,
    seed: int = 0,
    key_added: str = "split",
) -> pd.Series:
    """Hold out doses of perturbations whose other doses are seen.

    Parameters
    ----------
    dosage_key
        Column of `adata.obs` with doses, as in ``setup_anndata``.
    test_doses
        ``"highest"`` or ``"lowest"``: that dose of each perturbation that has several, to
        extrapolate. Or doses, in the unit of the column, of any perturbation.
    adata, perturbation_key, control, combination_delimiter, test_controls, validation_size
        As for :func:`split_conditions`, as are ``seed`` and ``key_added``.

    Returns
    -------
    pandas.Series
        As of :func:`split_conditions`. A combination is held out if one of its doses is.

    Raises
    ------
    ScreenError
        As :func:`split_conditions`, or if no cell has one of the doses, or no perturbation has
        two.
    ValueError
        If a share is not between 0 and 1, or `test_doses` is another word.

    Examples
    --------
    >>> import anndata, pandas as pd
    >>> from scvi_sams.evaluation import split_doses
    >>> obs = pd.DataFrame({"drug": ["DMSO", "A", "A", "A"], "dose": [0, 1, 10, 100]})
    >>> adata = anndata.AnnData(obs=obs.set_axis(list("abcd")))
    >>> split_doses(adata, "drug", "DMSO", "dose", validation_size=0).tolist()
    ['train', 'train', 'train', 'test']
    """
    call = dict(locals())
    found = Conditions.from_obs(
        adata, perturbation_key, control, combination_delimiter, dosage_key
    )
    doses_of: dict[str, set[float]] = {}
    for parts in found.parts:
        for name, dose in parts.items():
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
    label_of = {
        label: "test"
        for label, parts in zip(found.labels, found.parts, strict=True)
        if held_out & parts.items()
    }
    names = [f"{name}:{dose:g}" for name, dose in held_out]
    rngs = np.random.default_rng(seed).spawn(1)[0], np.random.default_rng(seed)
    return _write_conditions(call, "split_doses", found, label_of, rngs, "dose", names)


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
    validation_size, seed, key_added
        As for :func:`split_conditions`.

    Returns
    -------
    pandas.Series
        As of :func:`split_conditions`.

    Raises
    ------
    ScreenError
        If a batch is not there, a cell has none, controls are to be trained on and are not
        described, `adata` is a view, or no cell is left for training.
    ValueError
        If a share is not between 0 and 1.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=100)
    >>> column = scvi_sams.evaluation.split_batches(adata, "replicate", ["replicate_2"])
    >>> adata.obs.loc[column == "test", "replicate"].unique().tolist()
    ['replicate_2']
    """
    call = dict(locals())
    _check_shares(call)
    choice_rng, validation_rng = np.random.default_rng(seed).spawn(2)
    batches = obs_column(adata, batch_key)
    if (missing := batches.isna().to_numpy()).any():
        raise ScreenError(
            f"Cells without a value in obs[{batch_key!r}]: {listed(adata.obs_names[missing])}. "
            "Drop them or fill it in."
        )
    batches = batches.astype(str)
    among = sorted(batches.unique())
    held_out = _chosen(test_batches, among, "batches", "test_batches", choice_rng)
    is_test = batches.isin(held_out).to_numpy()
    if train_on_controls:
        if perturbation_key is None or control is None:
            raise ScreenError(
                "train_on_controls=True needs to know the control cells: give `perturbation_key` "
                "and `control`."
            )
        found = Conditions.from_obs(adata, perturbation_key, control, combination_delimiter)
        is_test = is_test & ~found.is_control[found.codes]
    labels = np.where(is_test, "test", "train").astype(object)
    divide_training(labels, validation_size, validation_rng)
    return _write(call, "split_batches", labels, "batch", held_out)


def split_indices(adata: AnnData, split_key: str = "split") -> list[NDArray[np.intp]]:
    """Positions of the cells of each part, as training wants them.

    Parameters
    ----------
    adata
        The screen, cells x genes, with a split.
    split_key
        Column of `adata.obs` with the split.

    Returns
    -------
    list of numpy.ndarray
        Positions (int, increasing) of the cells to train on, to validate on and to test on.

    Raises
    ------
    ScreenError
        If the column is absent or holds other labels, or cells are unused: scvi-tools wants every
        cell of an AnnData to be in one of the three.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=100)
    >>> column = scvi_sams.evaluation.split_cells(adata)
    >>> parts = scvi_sams.evaluation.split_indices(adata)
    >>> [len(part) for part in parts]
    [64, 16, 20]
    >>> model.train(datasplitter_kwargs={"external_indexing": parts})  # doctest: +SKIP
    """
    labels = split_column(adata, split_key)
    if n_unused := int((labels == "unused").sum()):
        raise ScreenError(
            f"{n_unused} cells of obs[{split_key!r}] are 'unused', and training wants every cell "
            f"in a part: leave them out with adata = adata[adata.obs[{split_key!r}] != 'unused']"
            ".copy(), before setup_anndata."
        )
    return [np.flatnonzero(labels == part) for part in SPLIT_LABELS[:3]]


def count_seen_perturbations(
    adata: AnnData,
    split_key: str,
    perturbation_key: str,
    control: str | Iterable[str] | None,
    combination_delimiter: str | None = "+",
) -> pd.DataFrame:
    """Count, for each condition, how many of its perturbations are seen in training.

    Parameters
    ----------
    adata
        The screen, cells x genes, with a split.
    split_key
        Column of `adata.obs` with the split.
    perturbation_key, control, combination_delimiter
        As in ``setup_anndata``.

    Returns
    -------
    pandas.DataFrame
        All conditions but the control: ``n_perturbations``, ``n_seen`` (those that occur in any
        cell for training, alone or in a combination) and the cells in each part, ``n_train``,
        ``n_validation``, ``n_test`` and ``n_unused``.

    Raises
    ------
    ScreenError
        If a column is absent or cannot be read.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=500)
    >>> keys = ("perturbation", "control")
    >>> _ = scvi_sams.evaluation.split_pairs(adata, *keys, n_seen=1, seed=1)
    >>> table = scvi_sams.evaluation.count_seen_perturbations(adata, "split", *keys)
    >>> table.loc[table["n_test"] > 0, "n_seen"].unique().tolist()
    [1]
    """
    labels = split_column(adata, split_key)
    found = Conditions.from_obs(adata, perturbation_key, control, combination_delimiter)
    seen = set().union(*(found.parts[code] for code in np.unique(found.codes[labels == "train"])))
    table = pd.DataFrame(
        {
            "n_perturbations": [len(parts) for parts in found.parts],
            "n_seen": [len(parts.keys() & seen) for parts in found.parts],
        },
        index=pd.Index(found.labels, name="condition"),
    )
    for label in SPLIT_LABELS:
        table[f"n_{label}"] = np.bincount(found.codes[labels == label], minlength=len(table))
    return table[~found.is_control]


# -- shared steps --------------------------------------------------------------------------------


def write_split(
    adata: AnnData,
    labels: NDArray[np.object_],
    key_added: str,
    *,
    kind: str,
    seed: int | None,
    arguments: Mapping[str, Any],
    held_out_by: HeldOutBy,
    held_out: Iterable[str] = (),
) -> pd.Series:
    """Write a split and its record, and return its column.

    The record, ``adata.uns[SPLITS_UNS_KEY][key_added]``, has what is below and the version.
    """
    if adata.is_view:
        raise ScreenError(
            "A split cannot be written into a view of an AnnData: make it one of its own first, "
            "with adata = adata.copy()."
        )
    if not (labels == "train").any():
        raise ScreenError(f"{kind} leaves no cell for training: hold out less.")
    adata.obs[key_added] = pd.Series(
        pd.Categorical(labels, categories=list(SPLIT_LABELS)), index=adata.obs_names
    )
    given = {name: _storable(value) for name, value in arguments.items() if value is not None}
    record = {
        "kind": kind,
        "arguments": given,
        "package_version": version("scvi-sams"),
        "held_out_by": held_out_by,
        "held_out": np.array(sorted(map(str, held_out)), dtype=object),
        **({} if seed is None else {"seed": seed}),
    }
    adata.uns[SPLITS_UNS_KEY] = {**adata.uns.get(SPLITS_UNS_KEY, {}), key_added: record}
    return adata.obs[key_added]


def _write(
    call: Mapping[str, Any],
    kind: str,
    labels: NDArray[np.object_],
    held_out_by: HeldOutBy,
    held_out: Iterable[str] = (),
) -> pd.Series:
    """Write the split that a function was called for, with the arguments of the call."""
    own = ("adata", "seed", "key_added")
    record: dict[str, Any] = {"kind": kind, "held_out_by": held_out_by, "held_out": held_out}
    record["arguments"] = {name: value for name, value in call.items() if name not in own}
    return write_split(call["adata"], labels, call["key_added"], seed=call["seed"], **record)


def _write_conditions(
    call: Mapping[str, Any],
    kind: str,
    found: Conditions,
    label_of: Mapping[str, str],
    rngs: tuple[Generator, Generator | None],
    held_out_by: HeldOutBy,
    held_out: Iterable[str],
) -> pd.Series:
    """Write a split by the label of each condition, training for others.

    The generators are of the controls held out, and of the cells for validation; None where
    validation takes conditions.
    """
    _check_shares(call)
    by_code = np.array([label_of.get(label, "train") for label in found.labels], dtype=object)
    labels = by_code[found.codes]
    controls = np.flatnonzero(found.is_control[found.codes])
    n_test = int(call["test_controls"] * controls.size + 1e-9)  # 0.3 of 10 is 3, not 2.9999...
    labels[rngs[0].permutation(controls)[:n_test]] = "test"
    if rngs[1] is not None:
        divide_training(labels, call["validation_size"], rngs[1])
    return _write(call, kind, labels, held_out_by, held_out)


def split_column(adata: AnnData, split_key: str) -> NDArray[np.object_]:
    """Read the label of each cell, which must be one of :data:`SPLIT_LABELS`."""
    labels = obs_column(adata, split_key).astype(object)
    if faulty := sorted({str(label) for label in labels.unique()}.difference(SPLIT_LABELS)):
        raise ScreenError(
            f"obs[{split_key!r}] holds {listed(faulty)}, but a split has the labels "
            f"{', '.join(map(repr, SPLIT_LABELS))}: rename them, cells of no part to 'unused'."
        )
    return labels.to_numpy(dtype=object)


def random_share(strata: NDArray[np.intp], share: float, rng: Generator) -> NDArray[np.bool_]:
    """Draw a share of the cells of each stratum.

    Shares are rounded up or down at random, so that many small strata together give the share
    asked for. With the same generator a larger share contains a smaller one.
    """
    _, strata, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    order = np.lexsort((rng.random(len(strata)), strata))
    rank = np.empty(len(strata), dtype=np.intp)
    rank[order] = np.arange(len(strata)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    # Rounded, so that 0.3 of 10 is 3 and not 2.9999...
    wanted = np.floor(np.round(share * sizes, 9) + rng.random(len(sizes)))
    return rank < wanted[strata]


def divide_training(
    labels: NDArray[np.object_],
    validation_size: float,
    rng: Generator,
    strata: NDArray[np.intp] | None = None,
) -> None:
    """Turn a share of the cells to train on into cells to validate on, in place."""
    is_training = labels == "train"
    groups = np.where(is_training, 0 if strata is None else strata, -1)
    labels[is_training & random_share(groups, validation_size, rng)] = "validation"


def check_names(names: Sequence[str], among: Sequence[str], what: str, argument: str) -> None:
    """Refuse names of what is not there."""
    if unknown := [name for name in names if name not in set(among)]:
        close = nearest(unknown[0], among)
        raise ScreenError(
            f"`{argument}` names {what} that no cell has: {listed(unknown)}. "
            + (f"Did you mean {listed(close)}?" if close else f"There are {listed(among)}.")
        )


def _chosen(
    wanted: float | Sequence[str],
    among: Sequence[str],
    what: str,
    argument: str,
    rng: Generator,
    conditions: Conditions | None = None,
) -> list[str]:
    """Take the names given, those of conditions in any order of their parts, or draw a share."""
    if isinstance(wanted, int | float):
        _check_shares({argument: wanted})
        if not among:
            raise ScreenError(f"There are no {what} to hold out.")
        n = min(max(round(wanted * len(among)), 1), len(among)) if wanted else 0
        return sorted(str(among[i]) for i in rng.permutation(len(among))[:n])
    names = [str(name) for name in ([wanted] if isinstance(wanted, str) else wanted)]
    if conditions is not None:
        return [conditions.labels[code] for code in conditions.find(names)]
    check_names(names, among, what, argument)
    return sorted(set(names))


def _check_shares(arguments: Mapping[str, Any]) -> None:
    """Refuse numbers, other than a seed, that are no shares."""
    for name, share in arguments.items():
        is_number = isinstance(share, int | float) and name not in {"seed", "n_seen"}
        if is_number and not 0 <= share <= 1:
            raise ValueError(f"{name}={share}: a share is between 0 and 1.")


def _storable(value: Any) -> Any:
    """Bring an argument into a form that an h5ad can hold."""
    if isinstance(value, str | int | float | bool | np.generic):
        return value
    return np.array([str(item) if isinstance(item, str) else item for item in value])
