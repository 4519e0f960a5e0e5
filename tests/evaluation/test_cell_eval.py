from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scvi_sams._exceptions import ScreenError
from scvi_sams.evaluation import (
    export_cell_eval,
    observed_effects,
    perturbation_discrimination,
)

KEYS = ("perturbation", "control")
CONDITIONS = ["g3", "g9", "P2", "P3", "P4"]  # two are named like genes


def _simulated(seed: int, n_cells: int = 50) -> ad.AnnData:
    """Five conditions, 60 genes: the k-th doubles genes 5k and 5k + 1 and quarters two more."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(["control", *CONDITIONS], [2 * n_cells, *[n_cells] * 5])
    mean = np.full((len(labels), 60), 6.0)
    for k, condition in enumerate(CONDITIONS):
        mean[labels == condition, 5 * k : 5 * k + 4] *= [2, 2, 0.25, 0.25]
    order = rng.permutation(len(labels))
    counts = rng.poisson(mean * rng.gamma(10, 0.1, size=(len(labels), 1)))
    return ad.AnnData(
        sp.csr_matrix(counts[order].astype(np.float32)),
        obs=pd.DataFrame({"perturbation": labels[order]}, index=[f"c{i}" for i in order]),
        var=pd.DataFrame(index=[f"g{i}" for i in range(60)]),
    )


@pytest.fixture(scope="module")
def real() -> ad.AnnData:
    return _simulated(0)


@pytest.fixture(scope="module")
def predicted() -> ad.AnnData:
    """Good cells of the first two conditions; of the others, one for another."""
    cells = _simulated(1)
    swaps = {"P2": "P3", "P3": "P4", "P4": "P2"}
    cells.obs["perturbation"] = cells.obs["perturbation"].replace(swaps)
    return cells


class TestExport:
    def test_what_is_written(self, predicted, real, tmp_path):
        shuffled = real[:, ::-1].copy()
        shuffled.layers["counts"] = shuffled.X.copy()
        shuffled.X = shuffled.X * 0
        renamed = predicted.copy()
        renamed.obs = renamed.obs.rename(columns={"perturbation": "condition"})
        export = export_cell_eval(
            renamed,
            shuffled,
            tmp_path / "new" / "folder",
            *KEYS,
            layer="counts",
            predicted_perturbation_key="condition",
        )
        assert {path.name for path in export.real.parent.iterdir()} == {
            "predicted.h5ad",
            "real.h5ad",
        }
        files = [ad.read_h5ad(path) for path in export[:2]]
        labels = [file.obs["perturbation"].astype(str) for file in files]
        for file, label in zip(files, labels, strict=True):
            assert list(file.var_names) == list(predicted.var_names)
            assert file.obs_names.is_unique
            assert sorted(set(label)) == sorted(["control", *CONDITIONS])
            np.testing.assert_allclose(np.expm1(file.X.toarray()).sum(axis=1), 1e4, rtol=1e-4)
        controls = [
            file.X.toarray()[label == "control"] for file, label in zip(files, labels, strict=True)
        ]
        np.testing.assert_array_equal(*controls)
        counts = real.X.toarray()[(real.obs["perturbation"] == "control").to_numpy()]
        expected = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))
        np.testing.assert_allclose(controls[0], expected, rtol=1e-5)
        own = files[0].X.toarray()[(labels[0] == "P3").to_numpy()]
        counts = predicted.X.toarray()[(predicted.obs["perturbation"] == "P3").to_numpy()]
        expected = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))
        np.testing.assert_allclose(own, expected, rtol=1e-5)

    def test_cell_eval2_takes_counts_and_real_controls(self, predicted, real, tmp_path):
        export = export_cell_eval(predicted, real, tmp_path, *KEYS, version=2)
        assert export.command[0] == "cell-eval2"
        guess, truth = (ad.read_h5ad(path) for path in export[:2])
        is_control = (predicted.obs["perturbation"] == "control").to_numpy()
        n = (~is_control).sum()
        np.testing.assert_array_equal(guess.X[:n].toarray(), predicted.X[~is_control].toarray())
        of_controls = (real.obs["perturbation"] == "control").to_numpy()
        np.testing.assert_array_equal(guess.X[n:].toarray(), real.X[of_controls].toarray())
        np.testing.assert_array_equal(truth.X.toarray(), real.X.toarray())
        assert list(truth.obs["perturbation"]) == list(real.obs["perturbation"])
        halved = real.copy()
        halved.X = halved.X * 0.5
        with pytest.raises(ScreenError, match="counts are not whole"):
            export_cell_eval(predicted, halved, tmp_path, *KEYS, version=2)
        with pytest.raises(ValueError, match="version=3"):
            export_cell_eval(predicted, real, tmp_path, *KEYS, version=3)

    def test_other_conditions_and_cells_without_one_are_left_out(self, predicted, real, tmp_path):
        few = predicted[predicted.obs["perturbation"].isin(["P3", "g9"])]
        real = real.copy()
        labels = real.obs["perturbation"].astype(object)
        labels[labels == "control"] = np.where(np.arange(100) < 50, "control", "NT")
        labels.iloc[:3] = None
        real.obs["perturbation"] = labels
        export = export_cell_eval(few, real, tmp_path, "perturbation", ["NT", "control"])
        assert export.command[-1] == "NT"
        table = ad.read_h5ad(export.real).obs["perturbation"]
        assert sorted(table.unique()) == ["NT", "P3", "g9"]
        assert (table == "NT").sum() == labels.isin(["NT", "control"]).sum()
        assert sorted(ad.read_h5ad(export.predicted).obs["perturbation"].unique()) == [
            "NT",
            "P3",
            "g9",
        ]

    def test_old_files_stay_whole_if_it_fails(self, predicted, real, tmp_path, monkeypatch):
        export = export_cell_eval(predicted, real, tmp_path, *KEYS)
        before = [path.read_bytes() for path in export[:2]]
        write = ad.AnnData.write_h5ad

        def fails_at_the_second(self, path, **arguments):
            if "real" in Path(path).name:
                raise OSError("no space left on the device")
            write(self, path, **arguments)

        monkeypatch.setattr(ad.AnnData, "write_h5ad", fails_at_the_second)
        with pytest.raises(OSError, match="no space"):
            export_cell_eval(predicted[::2], real, tmp_path, *KEYS)
        assert [path.read_bytes() for path in export[:2]] == before
        assert len(list(tmp_path.iterdir())) == 2

    def test_refusals(self, predicted, real, tmp_path):
        with pytest.raises(
            ScreenError, match="`control` is 'NT', the labels begin with 'P2', 'P3'"
        ):
            export_cell_eval(predicted, real, tmp_path, "perturbation", "NT")
        with pytest.raises(ScreenError, match="no cell of a condition"):
            export_cell_eval(real[real.obs["perturbation"] == "control"], real, tmp_path, *KEYS)
        with pytest.raises(ScreenError, match="1 conditions of `predicted_cells` .* 'P3'"):
            export_cell_eval(predicted, real[real.obs["perturbation"] != "P3"], tmp_path, *KEYS)
        with pytest.raises(ScreenError, match="1 genes of `predicted_cells` .* 'g0'"):
            export_cell_eval(predicted, real[:, 1:], tmp_path, *KEYS)
        with pytest.raises(ScreenError, match="no column 'condition'"):
            export_cell_eval(
                predicted, real, tmp_path, *KEYS, predicted_perturbation_key="condition"
            )
        silent = predicted.copy()
        cell = np.flatnonzero(silent.obs["perturbation"] == "g3")[0]
        silent.X = sp.csr_matrix(silent.X.toarray() * (np.arange(350) != cell)[:, None])
        with pytest.raises(ScreenError, match="has library size 0"):
            export_cell_eval(silent, real, tmp_path, *KEYS)
        assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def program_results(predicted, real, tmp_path_factory) -> pd.DataFrame:
    pytest.importorskip("cell_eval")
    folder = tmp_path_factory.mktemp("cell_eval")
    export = export_cell_eval(predicted, real, folder, *KEYS)
    program = Path(sys.executable).with_name("cell-eval")
    subprocess.run(
        [program, *export.command[1:], "--outdir", folder / "out", "--profile", "vcc"],
        check=True,
        capture_output=True,
    )
    return pd.read_csv(folder / "out" / "results.csv", index_col="perturbation")


def test_cell_eval2_tells_good_cells_from_swapped_ones(predicted, real, tmp_path):
    pytest.importorskip("cell_eval2")
    export = export_cell_eval(predicted, real, tmp_path, *KEYS, version=2)
    program = Path(sys.executable).with_name("cell-eval2")
    arguments = [*export.command[1:], "--outdir", tmp_path / "out", "--profile", "pds"]
    subprocess.run([program, *arguments], check=True, capture_output=True)
    score = pd.read_csv(tmp_path / "out" / "results.csv", index_col="perturbation")["value"]
    assert (score[["g3", "g9"]] == 1).all()
    assert (score[["P2", "P3", "P4"]] < 1).all()


@pytest.mark.slow  # the compiler of pdex starts anew in every process
class TestAgainstTheProgram:
    def test_discrimination_is_the_same(self, program_results, predicted, real):
        own = perturbation_discrimination(*_effects(predicted, real))
        assert program_results["discrimination_score_l1"].to_dict() == pytest.approx(own.to_dict())
        assert own[["g3", "g9"]].to_list() == [1.0, 1.0]
        assert (own[["P2", "P3", "P4"]] < 1).all()

    def test_absolute_errors_are_the_same(self, program_results, predicted, real):
        guess, truth = _effects(predicted, real)
        # Effects in log2, cell-eval in natural logarithms; the controls are shared.
        own = np.log(2) * (guess - truth).abs().mean(axis=1)
        assert program_results["mae"].to_dict() == pytest.approx(own.to_dict(), rel=1e-4)


def _effects(predicted: ad.AnnData, real: ad.AnnData) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Effects of predicted and real cells, both against the real controls."""
    is_control = (real.obs["perturbation"] == "control").to_numpy()
    with_controls = ad.concat(
        [predicted[predicted.obs["perturbation"] != "control"], real[is_control]],
        index_unique="-",
    )
    guess, truth = (
        observed_effects(cells, *KEYS, conditions=CONDITIONS).to_df()
        for cells in (with_controls, real)
    )
    return guess, truth
