"""What a fit replaces, and what it leaves alone."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import scvi_sams

LABELS = ("--perturbation-key", "perturbation", "--control", "control")
MARK = ".scvi-sams-output.json"


@pytest.fixture
def fit(run, screen_path, tmp_path):
    def fit(*words):
        words = ("--n-latent", 3, "--max-epochs", 1, *words, "-o", tmp_path / "out")
        return run("fit", screen_path, *LABELS, *words)

    return fit


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_folder_of_something_else_is_kept(fit, tmp_path, overwrite):
    output = tmp_path / "out"
    output.mkdir()
    (output / "summary.json").write_text("mine")
    done = fit(*overwrite)
    assert done.code == 1
    assert f"{output} is not a folder that `scvi-sams fit` wrote" in done.error
    assert (output / "summary.json").read_text() == "mine"


@pytest.mark.parametrize("mark", ["", "{", "[]", '{"files": ["/etc/passwd", "../thesis.txt"]}'])
def test_a_damaged_mark_is_none(fit, tmp_path, mark):
    output = tmp_path / "out"
    output.mkdir()
    (output / MARK).write_text(mark)
    assert "is not a folder that `scvi-sams fit` wrote" in fit("--overwrite").error


@pytest.mark.slow
def test_overwriting_replaces_what_fit_wrote_and_nothing_else(fit, tmp_path):
    output = tmp_path / "out"
    output.mkdir()  # an empty one is as good as none
    assert fit("--held-out-conditions", "P002").code == 0
    mark = json.loads((output / MARK).read_text())
    assert mark["version"] == scvi_sams.__version__
    files = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    assert set(mark["files"]) == files - {MARK}
    assert {"scorecard.csv", "model/model.pt"} <= files

    (output / "notes.txt").write_text("mine")
    (output / "model" / "notes.txt").write_text("mine")
    first = (output / "masks.csv").read_text()
    assert "add --overwrite" in fit("--seed", 1).error
    assert (output / "masks.csv").read_text() == first
    assert fit("--seed", 1, "--overwrite").code == 0
    assert (output / "masks.csv").read_text() != first
    assert not (output / "scorecard.csv").exists()  # of the first fit alone
    assert (output / "notes.txt").read_text() == "mine"
    assert (output / "model" / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    (output / "scorecard.csv").write_text("mine")
    done = fit("--overwrite")
    assert f"{output / 'scorecard.csv'} was not written by `scvi-sams fit`" in done.error
    assert (output / "scorecard.csv").read_text() == "mine"


@pytest.mark.slow
def test_what_appears_during_a_fit_is_kept(fit, tmp_path, monkeypatch):
    output = tmp_path / "out"
    train = scvi_sams.SAMSVAE.train

    def train_slowly(model, **arguments):
        train(model, **arguments)
        output.mkdir()
        (output / "masks.csv").write_text("mine")

    monkeypatch.setattr(scvi_sams.SAMSVAE, "train", train_slowly)
    done = fit()
    assert done.code == 1
    assert (output / "masks.csv").read_text() == "mine"
    kept = tmp_path / "out.partial-1"
    assert done.error.endswith(f"what was finished is in {kept}")
    assert (kept / "summary.json").is_file()


@pytest.mark.slow
def test_a_fit_after_a_failed_one_works(fit, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:

        def fail(*_, **__):
            raise OSError("no such disk")

        patch.setattr(scvi_sams.SAMSVAE, "get_average_treatment_effect", fail)
        assert fit().code == 1
    assert fit().code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.partial-1"]


@pytest.mark.slow
def test_names_are_text_in_tables_and_in_the_report(run, screen_path, tmp_path):
    """Markup, escape codes, mathematics and formulas of a spreadsheet, as names."""
    adata = ad.read_h5ad(screen_path)
    names = {
        "P001": "=1-1",
        "P002": "[red]x[/red]",
        "P003": "\x1b[31mC",
        "P004": "@D",
        "P005": "$E$",
    }
    parts = [label.split("+") for label in adata.obs["perturbation"]]
    adata.obs["perturbation"] = ["|".join(names.get(p, p) for p in each) for each in parts]
    adata.var_names = ["-gene", "[bold]g[/]", "$a$", "$b_{$", *adata.var_names[4:]]
    adata.write_h5ad(tmp_path / "screen.h5ad")
    words = ("--combination-delimiter", "|", "--n-latent", 3, "--max-epochs", 1)
    done = run("fit", tmp_path / "screen.h5ad", *LABELS, *words, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert "\x1b" not in done.out + done.err
    for shown in ("=1-1", "[red]x[/red]", r"\x1b[31mC", "@D", "$E$"):
        assert f"  {shown} " in done.out
    effects = pd.read_csv(tmp_path / "out" / "effects.csv", index_col=0)
    assert set(effects.index) == {"'=1-1", "[red]x[/red]", "\x1b[31mC", "'@D", "$E$", "P006"}
    assert all(kind == np.float64 for kind in effects.dtypes)
    assert (effects < 0).any(axis=None)  # numbers keep their sign


@pytest.mark.slow
def test_a_summary_as_json_is_all_that_is_printed(fit, tmp_path):
    done = fit("--json")
    assert done.code == 0, done.err
    assert json.loads(done.out) == json.loads((tmp_path / "out" / "summary.json").read_text())


@pytest.mark.slow
def test_targets_and_members_of_the_family(run, fit, tmp_path):
    targets = tmp_path / "targets.csv"
    targets.write_text("gene,perturbation\ngene_07,P001\ngene_09,P003\n")
    done = fit("--targets", targets, "--model", "cpavae")
    assert done.code == 0, done.err
    output = tmp_path / "out"
    direct = pd.read_csv(output / "direct_effects.csv", index_col=0)
    assert direct["gene"].to_dict() == {"P001": "gene_07", "P003": "gene_09"}
    assert json.loads((output / "summary.json").read_text())["model"] == "cpavae"
    assert not {"masks.csv", "masks.png"} & {path.name for path in output.iterdir()}
    cells = tmp_path / "cells.h5ad"
    done = run("predict", output, "--conditions", "P001", "--n-samples", 1, "-o", cells)
    assert done.code == 0, done.err
    assert done.out == f"1 cell x 60 genes, 1 of each of 1 condition, are in {cells}\n"


@pytest.mark.slow
def test_targets_from_the_file(run, screen_path, fit, tmp_path):
    """A column of the screen; without one, a line says that there are no targets."""
    adata = ad.read_h5ad(screen_path)
    adata.obs["target"] = adata.obs["perturbation"].astype(str).map({"P001": "gene_07"})
    adata.write_h5ad(path := tmp_path / "screen.h5ad")
    words = ["--perturbation-key", "perturbation", "--control", "control", "--max-epochs", 1]
    words += ["--target-gene-key", "target", "-o", tmp_path / "named"]
    done = run("fit", path, *words)
    assert done.code == 0, done.err
    assert "No perturbation is named like a gene" not in done.err
    direct = pd.read_csv(tmp_path / "named" / "direct_effects.csv", index_col=0)
    assert direct["gene"].to_dict() == {"P001": "gene_07"}
    assert "No perturbation is named like a gene" in fit("--max-epochs", 1).err


@pytest.mark.slow
def test_evidence_is_passed_on(fit, tmp_path):
    assert fit("--mask-evidence-cells", 7).code == 0
    model = scvi_sams.SAMSVAE.load(str(tmp_path / "out" / "model"), adata=False)
    assert model.init_params_["non_kwargs"]["mask_evidence_cells"] == 7
