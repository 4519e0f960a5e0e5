from __future__ import annotations

import pandas as pd
import pytest
import scvi

import scvi_sams


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A folder with a model whose masks are on, as ``fit`` leaves it."""
    adata = scvi_sams.datasets.simulated_screen(
        n_cells=800, n_genes=60, n_perturbations=6, n_pairs=0, n_latent=3, effect_size=3.0
    )
    scvi_sams.SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control")
    scvi.settings.seed = 0
    model = scvi_sams.SAMSVAE(adata, n_latent=4, n_hidden=32)
    model.train(max_epochs=15, accelerator="cpu", enable_progress_bar=False)
    folder = tmp_path_factory.mktemp("fitted")
    model.save(str(folder / "model"))
    return folder, model


def test_a_table_and_a_picture_are_written(run, fitted, tmp_path):
    folder, model = fitted
    output = tmp_path / "new" / "plan.csv"
    words = ("--cells", 20, 80, "--depth", 0.5, 1, "--guides", 3, "--guide-variation", 0.4)
    done = run("plan", folder, *words, "-o", output)
    assert done.code == 0, done.err
    expected = scvi_sams.tl.plan_screen(
        model, [20, 80], depth=[0.5, 1], guides=3, guide_variation=0.4
    )
    pd.testing.assert_frame_equal(pd.read_csv(output), expected, check_dtype=False)
    assert sorted(path.name for path in output.parent.iterdir()) == ["plan.csv", "plan.png"]
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "4 designs are in" in done.out


def test_files_are_replaced_only_when_asked(run, fitted, tmp_path):
    (tmp_path / "plan.png").write_text("mine")
    words = ("plan", fitted[0], "--cells", 20, "-o", tmp_path / "plan.csv")
    done = run(*words)
    assert (done.code, (tmp_path / "plan.png").read_text()) == (1, "mine")
    assert "--overwrite" in done.error
    assert not (tmp_path / "plan.csv").exists()
    assert run(*words, "--overwrite").code == 0


@pytest.mark.parametrize(
    ("words", "code", "culprit"),
    [
        (["--cells", "-5"], 2, "is not above 0"),
        (["--fdr", "1"], 2, "is not above 0 and below 1"),
        (["--guides", "3"], 1, "guide_variation"),
    ],
)
def test_what_cannot_be_planned_is_named(run, fitted, tmp_path, words, code, culprit):
    done = run("plan", fitted[0], *words, "-o", tmp_path / "plan.csv")
    assert done.code == code
    assert culprit in done.error
    assert list(tmp_path.iterdir()) == []
