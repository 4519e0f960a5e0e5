"""Random arguments and inputs: each call answers, with numbers that mean something, or refuses.

What is refused is refused by this package (the error is raised in it, and is one of its kinds),
never by a library that it handed the nonsense on to; and no table that comes back has a missing
value.
"""

from __future__ import annotations

import inspect
import os
import traceback
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import scvi_sams
from scvi_sams import SAMSVAE, ScreenError, tl
from scvi_sams.data import Conditions
from scvi_sams.data.field import registered_conditions

hypothesis = pytest.importorskip("hypothesis", reason="of the extra `test`")
st = hypothesis.strategies

# Derandomised, so that a failure is one of the commit and not of the day;
# SCVI_SAMS_FUZZ=20 tries twenty times as many.
TIMES = int(os.environ.get("SCVI_SAMS_FUZZ", "1"))
PACKAGE = str(Path(scvi_sams.__file__).parent)
REFUSALS = (ScreenError, ValueError, NotImplementedError)
# What is said of small and odd screens, which these are; each is tested elsewhere.
ADVICE = (
    "No cell is a control",
    "Perturbations with fewer than two cells",
    "Batches of adata.obs",
    "Contexts of adata.obs",
    "[0-9]+ cells? of .* without a guide",
    "Perturbations that no cell has apart",
    "Validation cells are described",
    "Category .* in adata.obs",  # of scvi-tools: few cells
    "Training will be faster when sparse matrix is formatted as CSR",  # of scvi-tools
)
QUIET = {"enable_progress_bar": False, "accelerator": "cpu", "logger": False}


def bounded(n_examples: int) -> Any:
    return hypothesis.settings(
        max_examples=TIMES * n_examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


def answer(call: Any, *args: Any, **kwargs: Any) -> Any:
    """What a call returns; None if this package refused it, with some words."""
    try:
        with warnings.catch_warnings():
            for advice in ADVICE:
                warnings.filterwarnings("ignore", advice, UserWarning)
            return call(*args, **kwargs)
    except REFUSALS as error:
        refusal = error
    raised_in = traceback.extract_tb(refusal.__traceback__)[-1].filename
    assert raised_in.startswith(PACKAGE), f"{type(refusal).__name__} of {raised_in}: {refusal}"
    assert len(str(refusal).split()) > 3, refusal
    return None


def assert_finite(found: Any) -> None:
    """No value of a result is missing or infinite."""
    if isinstance(found, ad.AnnData):
        parts = [found.X, *found.layers.values()]
    elif isinstance(found, dict):
        parts = list(found.values())
    elif isinstance(found, tuple | list):
        parts = list(found)
    elif isinstance(found, pd.DataFrame):
        if "null_q_value" in found:  # of null rows, and without a null, there is none
            found = found.drop(columns="null_q_value").dropna(subset="q_value")
        if "off_target" in found:  # of a target with one guide there is no test
            found = found.drop(columns=["similarity", "p_value", "q_value"])
        parts = [found.select_dtypes("number").to_numpy()]
    else:
        values = found.toarray() if sparse.issparse(found) else found
        values = getattr(values, "todense", lambda: values)()
        if isinstance(values, float | np.ndarray | torch.Tensor):
            assert np.isfinite(np.asarray(values, dtype=np.float64)).all()
        return
    for part in parts:
        assert_finite(part)


# -- what cells received, and counts --------------------------------------------------------------

NAMES = ["A", "B", "C", "control", "A+B", "B+A", "A+A", "A|B", "A:0.5", "A:x", " A", "A+", "+"]
MISSING = ["nan", "None", "NA", "", None, np.nan, pd.NA, 0, 1, True]
labels = st.lists(st.sampled_from(NAMES + MISSING), min_size=8, max_size=8)
usual = st.lists(st.sampled_from(["A", "B", "A+B", "control"]), min_size=8, max_size=8)
controls = st.sampled_from([None, "control", ["control"], ["A", "control"], [], "none", 0, True])
delimiters = st.sampled_from(["+", "|", None, ":", "A"])


def table_of(values: list[Any], n_genes: int = 3) -> ad.AnnData:
    counts = np.random.default_rng(0).poisson(3.0, (len(values), n_genes)) + 1.0
    obs = pd.DataFrame({"label": pd.Series(values, dtype=object)})
    obs.index = [f"cell{k}" for k in range(len(values))]
    return ad.AnnData(counts.astype(np.float32), obs=obs)


@bounded(150)
@hypothesis.given(labels | usual, controls, delimiters)
def test_labels(values, control, delimiter):
    """Whatever labels a screen has, they are read as doses of names, and read back alike."""
    adata = table_of(values)
    arguments = {"control": control, "combination_delimiter": delimiter}
    answer(SAMSVAE.setup_anndata, adata, perturbation_key="label", **arguments)
    manager = SAMSVAE._get_most_recent_anndata_manager(adata)
    if manager is None:
        return
    conditions = registered_conditions(manager)
    assert len(conditions.codes) == len(values)
    doses = conditions.matrix.toarray()
    assert np.isfinite(doses).all()
    assert (doses >= 0).all()
    assert not {"", "nan", "None"} & set(conditions.perturbations)
    again = Conditions.from_request(
        conditions.labels, conditions.perturbations, conditions.controls, delimiter
    )
    np.testing.assert_allclose(again.matrix.toarray()[again.codes], doses)


VALUES = [0.0, 1.0, 2.0, -1.0, 0.5, 1e-40, 1e39, 1e300, np.nan, np.inf, -np.inf]
numbers = st.lists(st.sampled_from(VALUES), min_size=16, max_size=16)


@bounded(150)
@hypothesis.given(
    numbers,
    st.sampled_from([np.asarray, sparse.csr_matrix, sparse.csc_array, pd.DataFrame]),
    st.sampled_from([None, ["A", "B"], ["A", "A"], ["A"], ["control", "B"], ["nan", "B"]]),
)
def test_dosage_matrices(values, storage, names):
    adata = table_of(["x"] * 8)
    matrix = storage(np.reshape(values, (8, 2)))
    if isinstance(matrix, pd.DataFrame):
        matrix = matrix.set_axis(adata.obs_names).set_axis(["A", "B"], axis=1)
    adata.obsm["doses"] = matrix
    if names is not None:
        adata.uns["names"] = np.array(names)
    key = None if names is None else "names"
    answer(SAMSVAE.setup_anndata, adata, dosage_key="doses", perturbation_names_uns_key=key)
    manager = SAMSVAE._get_most_recent_anndata_manager(adata)
    if manager is None:
        return
    given = np.reshape(values, (8, 2)).astype(np.float32)
    assert (given >= 0).all()
    assert np.isfinite(given).all()
    found = registered_conditions(manager).cell_matrix.toarray()
    np.testing.assert_array_equal(found, given)


@bounded(150)
@hypothesis.given(
    st.lists(st.sampled_from(VALUES[:5]) | st.sampled_from(VALUES), min_size=6, max_size=6),
    st.sampled_from([np.asarray, sparse.csr_matrix, sparse.csc_matrix]),
    st.sampled_from([np.float32, np.float64, np.int64, bool]),
)
def test_counts(values, storage, dtype):
    """Counts are whole numbers from 0 on that single precision holds, some in every cell."""
    hypothesis.assume(np.dtype(dtype).kind == "f" or np.isfinite(values).all())
    with np.errstate(all="ignore"):
        block = np.reshape(values, (2, 3)).astype(dtype)
        entered = block.astype(np.float32)
    adata = table_of(["A", "B"] * 4)
    counts = np.vstack([block, np.ones((6, 3), dtype)])
    adata.X = storage(counts)
    answer(SAMSVAE.setup_anndata, adata, perturbation_key="label")
    is_set_up = SAMSVAE._get_most_recent_anndata_manager(adata) is not None
    are_counts = (block >= 0).all() and np.isfinite(entered).all()
    are_counts = are_counts and (np.rint(block.astype(float)) == block).all()
    assert is_set_up == bool(are_counts and (entered.sum(1) > 0).all())


@bounded(150)
@hypothesis.given(
    st.lists(st.sampled_from([*VALUES, "1", "x", None, True]), min_size=8, max_size=8),
    st.sampled_from(
        ["batch_key", "size_factor_key", "continuous_covariate_keys", "dosage_key"]
        + ["categorical_covariate_keys", "labels_key"]
    ),
)
def test_columns(values, argument):
    """A column of obs in any part: what is registered of it is finite."""
    adata = table_of(["A", "B", "control", "A+B"] * 2)
    adata.obs["column"] = pd.Series(values, index=adata.obs_names)
    arguments = {argument: "column", "perturbation_key": "label", "control": "control"}
    answer(SAMSVAE.setup_anndata, adata, **arguments)
    manager = SAMSVAE._get_most_recent_anndata_manager(adata)
    if manager is None:
        return
    for key in manager.data_registry:
        registered = manager.get_from_registry(key)
        assert np.isfinite(np.asarray(registered, dtype=np.float32)).all(), key


GUIDES = ["A_1", "A_2", "B_1", "AB_1", "NT_1"]
TARGETS = ["A", "B", "A+B", "control", "", None, np.nan, 1, ["A"], "A+", "nan"]
calls = st.lists(
    st.sampled_from([0.0] * 6 + [1.0] * 3 + [*VALUES, True, 7.0]), min_size=40, max_size=40
)


@bounded(150)
@hypothesis.given(
    calls,
    st.lists(
        st.sampled_from(["A", "B", "A+B", "control"]) | st.sampled_from(TARGETS), min_size=5
    ).map(lambda targets: targets[:5]),
    st.sampled_from([np.asarray, sparse.csr_matrix, sparse.csc_array, pd.DataFrame]),
    st.sampled_from([None, None, 1.0, 5, 0, "5", np.nan]),
)
def test_guides(values, targets, storage, threshold):
    """Cells have a dose of one of whatever their guides target, as brute force has it."""
    adata = table_of(["x"] * 8)
    matrix = np.reshape(values, (8, 5)).astype(np.float64)
    adata.obsm["guides"] = (
        pd.DataFrame(matrix, adata.obs_names, GUIDES)
        if storage is pd.DataFrame
        else storage(matrix)
    )
    adata.uns["names"] = GUIDES
    key = None if storage is pd.DataFrame else "names"
    answer(
        SAMSVAE.setup_anndata,
        adata,
        control="control",
        guide_key="guides",
        guide_targets=dict(zip(GUIDES, targets, strict=True)),
        guide_threshold=threshold,
        perturbation_names_uns_key=key,
    )
    manager = SAMSVAE._get_most_recent_anndata_manager(adata)
    if manager is None:
        return
    has = matrix == 1 if threshold is None else matrix >= threshold
    assert np.isfinite(matrix).all()
    assert (matrix >= 0).all()
    conditions = registered_conditions(manager)
    for cell, doses in enumerate(conditions.cell_matrix.toarray()):
        received = {
            name
            for guide in np.flatnonzero(has[cell])
            for name in str(targets[guide]).split("+")
            if name not in ("", "control")
        }
        found = dict(zip(conditions.perturbations, doses, strict=True))
        assert found == {name: float(name in received) for name in conditions.perturbations}
        assert received <= found.keys()


@bounded(100)
@hypothesis.given(
    st.lists(st.sampled_from(["s", "u"]) | st.sampled_from([*MISSING, "s "]), min_size=8).map(
        lambda values: values[:8]
    )
)
def test_contexts(values):
    """Each cell is in the context that its column says, or the column is refused."""
    adata = table_of(["A", "B", "control", "A+B"] * 2)
    adata.obs["context"] = pd.Series(values, index=adata.obs_names, dtype=object)
    answer(
        SAMSVAE.setup_anndata,
        adata,
        perturbation_key="label",
        control="control",
        context_key="context",
    )
    manager = SAMSVAE._get_most_recent_anndata_manager(adata)
    if manager is None:
        return
    codes = np.asarray(manager.get_from_registry("context")).ravel()
    assert not pd.isna(values).any()
    for code in np.unique(codes):
        assert len({values[cell] for cell in np.flatnonzero(codes == code)}) == 1
    assert len(np.unique(codes)) == len(set(values))


# -- arguments ------------------------------------------------------------------------------------

ANYTHING = [
    *(None, True, False, 0, 1, 3, -1, 2.5, 1e-3, np.nan, np.inf, np.int64(2), np.float32(0.5)),
    *("x", "", "P001", "control", "prior", "P001+P002", "P001:2", "normal", "auto", "mean"),
    *([], [0, 1], [0.5], [True, False], ["P001"], ["P001", "P001"], [None], (1, 2), (0.5, -1)),
    *({}, {"P001": 1.0}, {"P001": -1.0}, {"P001": np.nan}, {"lr": 1e-3}, {"x": 1}),
    *(np.zeros((1, 1)), np.ones((2, 4)), np.array([0, 2]), slice(0, 2), slice(5, 5), object()),
]
anything = st.sampled_from(ANYTHING)


@pytest.fixture(scope="module")
def model() -> SAMSVAE:
    adata = scvi_sams.datasets.simulated_screen(
        n_cells=60, n_genes=6, n_perturbations=4, n_pairs=2, n_latent=2, control_fraction=0.3
    )
    SAMSVAE.setup_anndata(
        adata, perturbation_key="perturbation", control="control", batch_key="replicate"
    )
    fitted = SAMSVAE(adata, n_latent=2, n_hidden=4)
    fitted.train(max_epochs=2, **QUIET)
    return fitted


def arguments_of(function: Any, required: dict[str, Any], without: set[str]) -> Any:
    """Some arguments of a function, of any kind, and those that it does not run without."""
    parameters = inspect.signature(function).parameters.values()
    names = [
        p.name
        for p in parameters
        if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name not in without
    ]
    chosen = st.dictionaries(st.sampled_from(names), anything, max_size=2)
    return chosen.map(lambda some: required | some)


CONDITIONS = {"conditions": ["P001"]}
FEW = {"n_samples": 2}
METHODS: dict[str, dict[str, Any]] = {
    "predict": CONDITIONS | FEW,
    "get_average_treatment_effect": CONDITIONS | FEW | {"n_cells": 3},
    "get_perturbation_shift": CONDITIONS,
    "get_latent_representation": {},
    "get_elbo": FEW,
    "get_iwelbo": {"n_particles": 2},
    "get_normalized_expression": {},
    "get_reconstruction_error": {},
    "posterior_predictive_sample": {},
    "get_aggregated_posterior": {},
    "counterfactual": {"n_cells": 3},
    "get_perturbed_probability": {},
}
# Arguments that scvi-tools reads, and those that Python's own types are handed on in.
NOT_OURS = {
    *("self", "model", "dataloader", "data_loader_kwargs", "weights", "n_samples_overall"),
    *("return_numpy", "silent", "importance_weighting_kwargs", "transform_batch", "dof"),
}


@pytest.mark.parametrize("method", METHODS)
@bounded(60)
@hypothesis.given(st.data())
def test_methods(model, method, data):
    call = getattr(model, method)
    arguments = data.draw(arguments_of(call, METHODS[method], NOT_OURS))
    assert_finite(answer(call, **arguments))


ANALYSES: dict[str, dict[str, Any]] = {
    "mechanisms": {},
    "active_perturbations": {},
    "mask_prior": {},
    "differential_expression": CONDITIONS | FEW,
    "perturbation_distance": {},
    "guides": {},
    "plan_screen": FEW,
    "detectable_effects": {},
    "context_differences": {},
}


@pytest.mark.parametrize("analysis", ANALYSES)
@bounded(40)
@hypothesis.given(st.data())
def test_analyses(model, analysis, data):
    call = getattr(tl, analysis)
    without = {"model", "counterfactual", "null_tables"}
    arguments = data.draw(arguments_of(call, ANALYSES[analysis], without))
    assert_finite(answer(call, model, **arguments))


@bounded(80)
@hypothesis.given(st.data())
def test_constructor_and_train(model, data):
    """A model is made and trained to finite losses, or its arguments are refused."""
    of_model = arguments_of(SAMSVAE.__init__, {"n_latent": 2, "n_hidden": 4}, NOT_OURS | {"adata"})
    arguments = data.draw(of_model)
    hypothesis.assume("registry" not in arguments)
    made = answer(SAMSVAE, model.adata, **arguments)
    if made is None:
        return
    of_train = arguments_of(SAMSVAE.train, {"max_epochs": 1} | QUIET, {"self"})
    before = [values.clone() for values in made.module.parameters()]
    answer(made.train, **data.draw(of_train))
    if made.is_trained:
        assert all(values.isfinite().all() for values in made.module.parameters())
    else:
        for values, kept in zip(made.module.parameters(), before, strict=True):
            assert torch.equal(values, kept)


@bounded(60)
@hypothesis.given(
    st.lists(st.sampled_from([*range(-3, 3), 59, 60, 10**12, 0.5, 1.0, None, "x"]), max_size=4)
    | st.lists(st.booleans(), min_size=58, max_size=61)
)
def test_indices(model, indices):
    """Positions, or a mask of all cells; the answer has a row for each."""
    found = answer(model.get_latent_representation, indices=indices)
    if found is not None:
        is_mask = all(isinstance(index, bool) for index in indices)
        expected = np.flatnonzero(indices) if is_mask else np.asarray(indices, dtype=int)
        whole = model.get_latent_representation()
        np.testing.assert_allclose(found, whole[expected], rtol=1e-5, atol=1e-6)


# -- the command line -----------------------------------------------------------------------------

WORDS = [
    "fit",
    "predict",
    "simulated",
    "none.h5ad",
    "-o",
    "out",
    "--seed",
    "-1",
    "0",
    "nan",
    "--x",
]
WORDS += ["--n-latent", "--perturbation-key", "perturbation", "--control", "--conditions", "P001"]
WORDS += ["--max-epochs", "--json", "--model", "cpavae", "", "\x1b[31m", "[bold]", "--overwrite"]


@bounded(100)
@hypothesis.given(words=st.lists(st.sampled_from(WORDS), max_size=6))
def test_command_line(words):
    """Wrong words are told in one line and a status, whatever they are."""
    from scvi_sams.cli import main

    hypothesis.assume(not {"simulated", "fit"} <= set(words) or "--x" in words)  # a whole fit
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr.write", said.append)
        try:
            status = main(words)
        except SystemExit as done:  # of argparse
            status = done.code
    text = "".join(said)
    assert status in {0, 1, 2, None}
    assert "Traceback" not in text
    assert "\x1b[31m" not in text
