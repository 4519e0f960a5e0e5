from __future__ import annotations

import errno
import shutil
import warnings
from importlib.metadata import version

import anndata as ad
import h5py
import numpy as np
import pytest

import scvi_sams
from scvi_sams import ScreenError, TrainingDivergedError

LABELS = ("--perturbation-key", "perturbation", "--control", "control")


def _assert_refused(done, *culprits, code=1):
    """One line of cause and mend, naming the culprits, and no traceback."""
    assert done.code == code
    assert done.out == ""
    assert done.err.count("\n") == 1, done.err
    assert done.err.startswith("scvi-sams: error: ")
    for culprit in culprits:
        assert culprit in done.err


@pytest.mark.parametrize(
    ("words", "culprit"),
    [
        (["--seed", "x"], "--seed"),
        (["--seed", "-1"], "--seed"),
        (["--seed", "4294967296"], "--seed"),
        (["--model", "scvi"], "scvi"),
        (["--mask-evidence-cells", "0"], "--mask-evidence-cells"),
        (["--max-epochs", "0"], "--max-epochs"),
        (["--n-latent", "2.5"], "--n-latent"),
        (["--held-out-fraction", "1"], "--held-out-fraction"),
        (["--accelerator", "abacus"], "abacus"),
        (["--latents", "3"], "--latents"),
    ],
)
def test_arguments_that_do_not_parse(run, tmp_path, words, culprit):
    done = run("fit", "simulated", "-o", tmp_path / "out", *words)
    _assert_refused(done, culprit, code=2)


def test_no_command(run):
    _assert_refused(run(), "COMMAND", code=2)


def test_no_output(run):
    _assert_refused(run("fit", "simulated"), "--output", code=2)


def test_no_such_file(run, tmp_path):
    done = run("fit", tmp_path / "none.h5ad", *LABELS, "-o", tmp_path / "out")
    _assert_refused(done, "none.h5ad")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_hdf5(run, tmp_path):
    (tmp_path / "counts.csv").write_text("gene,cell\n")
    done = run("fit", tmp_path / "counts.csv", *LABELS, "-o", tmp_path / "out")
    _assert_refused(done, "counts.csv", "h5ad")


def test_a_file_that_is_hdf5_without_an_anndata(run, tmp_path):
    with h5py.File(tmp_path / "matrix.h5", "w") as file:
        file["X"] = np.ones(3)
    done = run("fit", tmp_path / "matrix.h5", *LABELS, "-o", tmp_path / "out")
    _assert_refused(done, "matrix.h5", "obs, var")


def test_a_damaged_file(run, screen_path, tmp_path):
    shutil.copy(screen_path, tmp_path / "damaged.h5ad")
    with h5py.File(tmp_path / "damaged.h5ad", "a") as file:
        del file["X"]["indptr"]
    done = run("fit", tmp_path / "damaged.h5ad", *LABELS, "-o", tmp_path / "out")
    _assert_refused(done, "damaged.h5ad")


@pytest.mark.parametrize(
    ("words", "culprits"),
    [
        ([], ["--perturbation-key", "'perturbation'", "'replicate'"]),
        (["--perturbation-key", "guide"], ["'guide'", "'perturbation'"]),
        (["--perturbation-key", "perturbation"], ["--control", "'control'"]),
        (["--perturbation-key", "perturbation", "--control", "NT"], ["'NT'"]),
        ([*LABELS, "--batch-key", "lane"], ["--batch-key", "'lane'"]),
        ([*LABELS, "--context-key", "type"], ["--context-key", "'type'"]),
        ([*LABELS, "--donor-key", "donor"], ["--donor-key", "'donor'"]),
        ([*LABELS, "--donor-key", "replicate", "--model", "cpavae"], ["--donor-key", "cpavae"]),
        ([*LABELS, "--size-factor-key", "umi"], ["--size-factor-key", "'umi'"]),
        ([*LABELS, "--layer", "raw"], ["'raw'"]),
        ([*LABELS, "--dosage-key", "dose"], ["'dose'"]),
        ([*LABELS, "--held-out-fraction", "1e-9"], ["--held-out-fraction"]),
        ([*LABELS, "--dosage-obsm", "dose"], ["--dosage-obsm", "--perturbation-key"]),
        (["--dosage-obsm", "dose"], ["'dose'", "obsm"]),
        ([*LABELS, "--targets", "none.csv"], ["none.csv", "--targets"]),
        (
            [*LABELS, "--model", "cpavae", "--mask-evidence-cells", 9],
            ["--mask-evidence-cells", "cpavae"],
        ),
    ],
)
def test_arguments_that_do_not_fit_the_screen(run, screen_path, tmp_path, words, culprits):
    done = run("fit", screen_path, "-o", tmp_path / "out", *words)
    _assert_refused(done, *culprits)
    assert list(tmp_path.iterdir()) == []


def test_counts_that_are_none(run, screen_path, tmp_path):
    adata = ad.read_h5ad(screen_path)
    adata.X.data[:] = 0.5
    adata.write_h5ad(tmp_path / "screen.h5ad")
    done = run("fit", tmp_path / "screen.h5ad", *LABELS, "-o", tmp_path / "out")
    _assert_refused(done, "adata.X")


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_genes_of_one_name_are_found_before_the_fit(run, screen_path, tmp_path):
    adata = ad.read_h5ad(screen_path)
    adata.var_names = ["MATR3", "MATR3", *adata.var_names[2:]]
    adata.write_h5ad(tmp_path / "screen.h5ad")
    done = run("fit", tmp_path / "screen.h5ad", *LABELS, "-o", tmp_path / "out")
    assert done.error.startswith("scvi-sams: error: ")
    assert "'MATR3'" in done.error
    assert "var_names_make_unique" in done.error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("table", "culprit"),
    [
        ("guide,gene\nP001,gene_1\n", "no column perturbation"),
        ("perturbation,gene\nP001,gene_01\nP001,gene_02\n", "'P001' twice"),
        ("perturbation,gene\nP999,gene_01\n", "'P999'"),
        ("perturbation,gene\nP001,MYC\n", "MYC"),
        ("", "targets.csv cannot be read"),
    ],
)
def test_targets_that_cannot_be_used(run, screen_path, tmp_path, table, culprit):
    path = tmp_path / "targets.csv"
    path.write_text(table)
    done = run("fit", screen_path, *LABELS, "--targets", path, "-o", tmp_path / "out")
    _assert_refused(done, culprit)


def test_target_gene_key_that_cannot_be_used(run, screen_path, tmp_path):
    words = ["fit", screen_path, *LABELS, "--target-gene-key", "nowhere"]
    _assert_refused(run(*words, "-o", tmp_path / "out"), "--target-gene-key 'nowhere'")
    table = tmp_path / "targets.csv"
    table.write_text("perturbation,gene\nP001,gene_01\n")
    done = run(*words, "--targets", table, "-o", tmp_path / "out")
    _assert_refused(done, "--target-gene-key is in place of --targets")


def test_a_gpu_that_is_not_there(run, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = run("fit", "simulated", "--accelerator", "gpu", "-o", tmp_path / "out")
    _assert_refused(done, "--accelerator gpu")


@pytest.mark.parametrize("error", [TrainingDivergedError, ScreenError])
def test_training_that_fails_is_one_line(run, screen_path, tmp_path, monkeypatch, error):
    def train(*_, **__):
        raise error("epoch 3:\nthe reconstruction is NaN; lower the learning rate")

    monkeypatch.setattr(scvi_sams.SAMSVAE, "train", train)
    done = run("fit", screen_path, *LABELS, "-o", tmp_path / "out")
    assert done.code == 1
    assert done.error == (
        "scvi-sams: error: epoch 3: the reconstruction is NaN; lower the learning rate"
    )
    assert list(tmp_path.iterdir()) == []


def _fail(monkeypatch, error, method="train"):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(scvi_sams.SAMSVAE, method, fail)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("Can't write data (errno = 28, error message = 'No space left on device')"),
    ],
)
def test_a_trained_model_outlives_a_full_disk(run, screen_path, tmp_path, monkeypatch, error):
    _fail(monkeypatch, error, "get_average_treatment_effect")
    done = run(
        *("fit", screen_path, *LABELS, "--n-latent", 4, "--max-epochs", 1),
        *("-o", tmp_path / "out"),
    )
    (kept,) = tmp_path.iterdir()
    assert done.code == 1
    assert done.error.startswith("scvi-sams: error: the disk is full (")
    assert done.error.endswith(
        f"free some space or choose another -o; what was finished is in {kept}; "
        "the same command with --resume goes on from there"
    )
    assert (kept / "model" / "model.pt").is_file()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"
        ),
    ],
)
def test_too_little_memory(run, screen_path, tmp_path, monkeypatch, error):
    _fail(monkeypatch, error)
    done = run("fit", screen_path, *LABELS, "-o", tmp_path / "out")
    assert done.code == 1
    assert done.error.startswith("scvi-sams: error: out of memory")
    assert "fewer cells, genes or latents" in done.error


def test_a_bug_of_ours_is_one_line_and_shows_its_place_on_request(
    run, screen_path, tmp_path, monkeypatch
):
    _fail(monkeypatch, AttributeError("a bug"))
    done = run("fit", screen_path, *LABELS, "-o", tmp_path / "out")
    assert done.code == 1
    assert done.error.startswith("scvi-sams: error: AttributeError: a bug; --debug shows where")
    assert "Traceback" not in done.err
    done = run("fit", screen_path, *LABELS, "-o", tmp_path / "out", "--debug")
    assert "Traceback" in done.err
    assert done.error.startswith("scvi-sams: error: AttributeError: a bug")


def test_an_error_shows_no_escape_codes(run, screen_path, tmp_path, monkeypatch):
    _fail(monkeypatch, ScreenError("gene '\x1b[31mred' [bold]and more[/]"))
    done = run("fit", screen_path, *LABELS, "-o", tmp_path / "out")
    assert done.error == r"scvi-sams: error: gene '\x1b[31mred' [bold]and more[/]"


def test_the_version_is_the_package_s(run):
    done = run("--version")
    assert (done.code, done.out) == (0, f"scvi-sams {version('scvi-sams')}\n")


def test_warnings_about_the_screen_are_lines_of_their_own(run, screen_path, tmp_path, monkeypatch):
    adata = ad.read_h5ad(screen_path)
    adata = adata[adata.obs["perturbation"] != "control"].copy()
    adata.obsm["dose"] = adata.obs["perturbation"].astype(str).str.get_dummies(sep="+")
    adata.write_h5ad(tmp_path / "screen.h5ad")

    def train(*_, **__):
        raise ScreenError("far enough")

    monkeypatch.setattr(scvi_sams.SAMSVAE, "train", train)
    done = run("fit", tmp_path / "screen.h5ad", "--dosage-obsm", "dose", "-o", tmp_path / "out")
    (line,) = [line for line in done.err.splitlines() if "warning" in line]
    assert line.startswith("scvi-sams: warning: No cell is a control")


def test_only_warnings_with_nothing_to_mend_are_hidden(run, screen_path, tmp_path, monkeypatch):
    module = "lightning.pytorch.loops.fit_loop"

    def train(*_, **__):
        for text, category, of in (
            ("The number of training batches (4) is small", UserWarning, module),
            ("`isinstance(treespec, LeafSpec)` is deprecated", FutureWarning, module),
            ("The loss is not what it was", UserWarning, module),
            ("The number of training batches is a matter of ours", UserWarning, "scvi_sams.train"),
            ("invalid value in divide", RuntimeWarning, "numpy"),
        ):
            warnings.warn_explicit(text, category, "file.py", 1, of)
        raise ScreenError("far enough")

    monkeypatch.setattr(scvi_sams.SAMSVAE, "train", train)
    done = run("fit", screen_path, *LABELS, "-o", tmp_path / "out")
    assert [line for line in done.err.splitlines() if "warning" in line] == [
        "scvi-sams: warning: The loss is not what it was",
        "scvi-sams: warning: The number of training batches is a matter of ours",
        "scvi-sams: warning: invalid value in divide",
    ]
