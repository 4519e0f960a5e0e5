"""Inputs that went wrong for somebody, by their number in the list of cases, and what is said."""

from __future__ import annotations

import contextlib
import copy
import io
import re
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import scvi
from scipy import sparse

import scvi_sams
from scvi_sams import SAMSVAE, ScreenError, pl
from scvi_sams.cli import main as command_line

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CASES", "Bench", "what_happens"]

QUIET = {"accelerator": "cpu", "enable_progress_bar": False}
LABELS = {"perturbation_key": "perturbation", "control": "control"}


class Bench:
    """A small screen, and models of it that are fitted when they are first asked for."""

    def __init__(self) -> None:
        adata = scvi_sams.datasets.simulated_screen(
            n_cells=400, n_genes=40, n_perturbations=5, n_pairs=2, n_latent=2
        )
        del adata.uns["truth"]
        self.adata = adata
        self._fitted: SAMSVAE | None = None

    def screen(self, **columns: Any) -> ad.AnnData:
        adata = self.adata.copy()
        for name, values in columns.items():
            adata.obs[name] = values
        return adata

    def fit(self, adata: ad.AnnData | None = None, **setup: Any) -> SAMSVAE:
        adata = self.screen() if adata is None else adata
        SAMSVAE.setup_anndata(adata, **(LABELS | setup))
        scvi.settings.seed = 0
        model = SAMSVAE(adata, n_latent=3, n_hidden=16)
        model.train(max_epochs=6, **QUIET)
        return model

    @property
    def model(self) -> SAMSVAE:
        self._fitted = self._fitted or self.fit()
        return self._fitted


CASES: dict[str, tuple[str, Callable[[Bench], Any]]] = {}


def case(number: str, title: str) -> Callable[[Any], Any]:
    """Enter a function in the list: it returns what was answered, or lets a refusal pass."""

    def enter(function: Callable[[Bench], Any]) -> Callable[[Bench], Any]:
        CASES[number] = title, function
        return function

    return enter


def what_happens(number: str, bench: Bench) -> str:
    """What becomes of a case: the first words of a refusal, of a warning, or the answer."""
    _, function = CASES[number]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            answer = function(bench)
        except Exception as error:  # noqa: BLE001 - of whatever kind: the list is to show it
            raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
            refused = isinstance(error, ScreenError) or "scvi_sams" in raised_in
            return f"{'refused' if refused else f'OPEN: {type(error).__name__}'}: {_short(error)}"
    of_ours = [str(w.message) for w in told if w.category is UserWarning]
    if answer is None and of_ours:
        return f"warned: {_short(of_ours[0])}"
    return f"answered: {answer}" if answer else f"OPEN: {answer}"


def _short(text: object, n_words: int = 16) -> str:
    text = re.sub(r"\S*/(?=model\.pt)", "", str(text))  # of a folder that is gone
    words = text.replace("|", "/").split()
    return " ".join(words[:n_words]) + (" ..." if len(words) > n_words else "")


# -- wrong results in silence ---------------------------------------------------------------------


@case("S1", "the same cells with their genes in another order")
def _(bench: Bench) -> Any:
    other = bench.model.adata[:, ::-1].copy()
    found, expected = (bench.model.get_latent_representation(a) for a in (other, None))
    return np.allclose(found, expected) and "reordered, the same latents"


@case("S1b", "the same cells with their genes renamed")
def _(bench: Bench) -> Any:
    other = bench.model.adata.copy()
    other.var_names = [f"other_{name}" for name in other.var_names]
    return bench.model.get_latent_representation(other) is None


@case("S2", "a continuous covariate in natural units, 0 to 10,000")
def _(bench: Bench) -> Any:
    unit = np.random.default_rng(0).random(bench.adata.n_obs)
    bounds = [
        bench.fit(bench.screen(cov=scale * unit), continuous_covariate_keys="cov").get_elbo()
        for scale in (1.0, 1e4)
    ]
    return abs(bounds[0] - bounds[1]) < 0.5 and "the bound of 0 to 1 within 0.5 nats"


@case("S3", "log counts x 1e4 with the normal likelihood")
def _(bench: Bench) -> Any:
    bounds = []
    for scale in (1.0, 1e4):
        adata = bench.screen()
        adata.X = scale * np.log1p(adata.layers["counts"].toarray())
        SAMSVAE.setup_anndata(adata, **LABELS, is_count_data=False)
        scvi.settings.seed = 0
        model = SAMSVAE(adata, n_latent=3, n_hidden=16, gene_likelihood="normal")
        model.train(max_epochs=6, **QUIET)
        bounds.append(model.get_elbo() + adata.n_vars * np.log(scale))
    return abs(bounds[0] - bounds[1]) < 0.5 and "the same bound in the same units, within 0.5 nats"


@case("S4", "train(early_stopping=True) of a fit that no longer improves")
def _(bench: Bench) -> Any:
    model = SAMSVAE(bench.model.adata, n_latent=2, n_hidden=4)
    model.train(
        max_epochs=40, early_stopping=True, early_stopping_min_delta=1e9, **QUIET
    )  # no gain is large enough
    return (
        model.trainer.current_epoch < 40 and f"stopped after {model.trainer.current_epoch} of 40"
    )


@case("S5", "guide features among the genes; a symbol twice")
def _(bench: Bench) -> Any:
    adata = bench.screen()
    adata.var["feature_types"] = ["CRISPR Guide Capture"] * 3 + ["Gene Expression"] * 37
    SAMSVAE.setup_anndata(adata, **LABELS)


@case("S6", "the label '(+)-JQ1' under the delimiter '+'")
def _(bench: Bench) -> Any:
    adata = bench.screen(perturbation=["(+)-JQ1", "control"] * 200)
    SAMSVAE.setup_anndata(adata, **LABELS)


@case("S7", "missing labels as the text 'None'")
def _(bench: Bench) -> Any:
    adata = bench.screen(perturbation=["None", "P001"] * 200)
    SAMSVAE.setup_anndata(adata, **LABELS)


@case("S8", "dual guides, a label that names one twice")
def _(bench: Bench) -> Any:
    adata = bench.screen(perturbation=["A|A", "control", "A", "B"] * 100)
    SAMSVAE.setup_anndata(adata, **LABELS, combination_delimiter="|")


@case("S9", "counts of guides as doses")
def _(bench: Bench) -> Any:
    adata = bench.screen()
    doses = np.random.default_rng(0).poisson(300, (400, 3)) * np.eye(4)[:, :3][np.arange(400) % 4]
    adata.obsm["guides"] = pd.DataFrame(doses, adata.obs_names, ["A", "B", "C"])
    SAMSVAE.setup_anndata(adata, dosage_key="guides")


@case("S10", "a matrix of indicators with its control column")
def _(bench: Bench) -> Any:
    adata = bench.screen(perturbation=["A", "B", "control", "C"] * 100)
    adata.obsm["doses"] = pd.get_dummies(adata.obs["perturbation"]).astype(float)
    SAMSVAE.setup_anndata(adata, dosage_key="doses", control="control")
    names = SAMSVAE(adata, n_latent=2, n_hidden=4).perturbation_names
    return "control" not in names and f"control is none of {', '.join(names)}"


@case("S11", "a boolean mask of another length")
def _(bench: Bench) -> Any:
    return bench.model.get_latent_representation(indices=np.ones(390, bool)) is None


@case("S12", "counts normalised in place after the fit")
def _(bench: Bench) -> Any:
    model = bench.fit()
    model.adata.X = model.adata.X.astype(np.float32).log1p()
    return model.get_latent_representation() is None


# -- messages -------------------------------------------------------------------------------------


@case("M1", "NaN in a continuous covariate")
def _(bench: Bench) -> Any:
    bench.fit(bench.screen(cov=[np.nan] + [1.0] * 399), continuous_covariate_keys=["cov"])


@case("M2", "NaN in the batch")
def _(bench: Bench) -> Any:
    bench.fit(bench.screen(batch=[None, *["a", "b"] * 199, "a"]), batch_key="batch")


@case("M4", "one covariate as text, continuous_covariate_keys='cov'")
def _(bench: Bench) -> Any:
    bench.fit(bench.screen(cov=np.arange(400.0)), continuous_covariate_keys="cov")
    return "taken as a list of one"


@case("M5", "control=0 among integer labels; predict([1])")
def _(bench: Bench) -> Any:
    model = bench.fit(bench.screen(perturbation=[0, 1, 2, 3] * 100), control=0)
    return f"{model.predict([1], n_samples=3).n_obs} cells"


@case("M6", "barcodes as indices")
def _(bench: Bench) -> Any:
    names = bench.model.adata.obs_names[:3]
    return f"latents {bench.model.get_latent_representation(indices=names).shape}"


@case("M7", "labels that predict wrote, 'P001:1+P002:0.5'")
def _(bench: Bench) -> Any:
    shift = bench.model.get_perturbation_shift(["P001:1+P002:0.5", {"P001": 1, "P002": 0.5}])
    return np.allclose(*shift.to_numpy()) and "read as the doses they say"


@case("M8", "training_history after another logger kept it")
def _(bench: Bench) -> Any:
    model = SAMSVAE(bench.model.adata, n_latent=2, n_hidden=4)
    model.train(max_epochs=1, logger=False, **QUIET)
    pl.training_history(model.history)


@case("M10", "plan_kwargs={'learning_rate': ...}")
def _(bench: Bench) -> Any:
    bench.model.train(plan_kwargs={"learning_rate": 0.1})


@case("M11", "a DataFrame in place of an AnnData")
def _(bench: Bench) -> Any:
    SAMSVAE.setup_anndata(bench.adata.to_df(), **LABELS)


@case("M12", "differential expression of cells on disk")
def _(bench: Bench) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        bench.model.adata.write_h5ad(Path(folder) / "cells.h5ad")
        backed = ad.read_h5ad(Path(folder) / "cells.h5ad", backed="r")
        try:
            bench.model.differential_expression(backed, "perturbation", "P001", silent=True)
        finally:
            backed.file.close()


@case("M13", "differential_expression(weights='importance')")
def _(bench: Bench) -> Any:
    bench.model.differential_expression(
        groupby="perturbation", group1="P001", weights="importance"
    )


@case("M14", "copy.deepcopy(model) after training")
def _(bench: Bench) -> Any:
    return copy.deepcopy(bench.model).is_trained and "a model"


@case("M15", "load_query_data from a pathlib.Path")
def _(bench: Bench) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        bench.model.save(Path(folder) / "model")
        query = SAMSVAE.load_query_data(bench.screen(), Path(folder) / "model", accelerator="cpu")
    return f"a model of {query.adata.n_obs} cells"


@case("M18", "view_anndata_setup()")
def _(bench: Bench) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        bench.model.view_anndata_setup()
    return "printed"


# -- faults and files -----------------------------------------------------------------------------


@case("F6", "a model file of another program, with Python objects in it")
def _(bench: Bench) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        scvi.model.base.BaseModelClass.save(bench.model, str(Path(folder) / "model"))
        SAMSVAE.load(Path(folder) / "model", adata=False)


@case("F7", "sparse indices out of range")
def _(bench: Bench) -> Any:
    adata = bench.screen()
    adata.X = sparse.csr_matrix(adata.X)
    adata.X.indices[7] = 10**6
    SAMSVAE.setup_anndata(adata, **LABELS)


@case("F8", "a dose of 1e39, infinite in single precision")
def _(bench: Bench) -> Any:
    labels = ["P001", "control"] * 200
    adata = bench.screen(perturbation=labels, dose=[1e39] + [1.0] * 399)
    SAMSVAE.setup_anndata(adata, **LABELS, dosage_key="dose")


@case("F9", "max_epochs=0")
def _(bench: Bench) -> Any:
    bench.model.train(max_epochs=0)


@case("F12", "the command line with --seed -1")
def _(bench: Bench) -> Any:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        command_line(["fit", "simulated", "-o", "out", "--seed", "-1"])
    raise ScreenError(said.getvalue().strip().splitlines()[-1])


@case("F15", "n_latent=0, dropout_rate=nan")
def _(bench: Bench) -> Any:
    SAMSVAE(bench.model.adata, n_latent=0)


# -- scvi-tools' conventions ----------------------------------------------------------------------


@case("V2", "plan_config=TrainingPlanConfig()")
def _(bench: Bench) -> Any:
    losses = []
    for config in (None, scvi.train.TrainingPlanConfig()):
        scvi.settings.seed = 0
        model = SAMSVAE(bench.model.adata, n_latent=2, n_hidden=4)
        model.train(max_epochs=2, plan_config=config, **QUIET)
        losses.append(model.history["train_loss"].to_numpy(float))
    return np.array_equal(*losses) and "the fit without it, bit for bit"


@case("V4", "get_latent_representation with scvi-tools' third argument, give_mean")
def _(bench: Bench) -> Any:
    first, second = (bench.model.get_latent_representation(None, [1], False) for _ in range(2))
    return not np.array_equal(first, second) and "draws"


@case("V5", "get_elbo(dataloader=...)")
def _(bench: Bench) -> Any:
    loader = bench.model._make_data_loader(bench.model.adata)
    return f"{type(bench.model.get_elbo(dataloader=loader)).__name__}, a float with .item()"


@case("V6", "differential_abundance, get_aggregated_posterior")
def _(bench: Bench) -> Any:
    with contextlib.redirect_stderr(io.StringIO()):
        bench.model.differential_abundance(sample_key="replicate")
    found = bench.model.adata.obsm["da_log_probs"]
    return f"log densities of {found.shape[0]} cells in {found.shape[1]} samples"


@case("V7", "controls in one of two batches only")
def _(bench: Bench) -> Any:
    is_control = bench.adata.obs["perturbation"] == "control"
    adata = bench.screen(lane=np.where(is_control | (np.arange(400) % 2 == 0), "1", "2"))
    SAMSVAE.setup_anndata(adata, **LABELS, batch_key="lane")
