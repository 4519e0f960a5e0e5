from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scvi_sams._exceptions import ScreenError
from scvi_sams.data import tables
from scvi_sams.evaluation import observed_effects


@pytest.fixture
def screen() -> ad.AnnData:
    rng = np.random.default_rng(0)
    labels = rng.choice(["control", "NT", "A", "B", "A+B"], 200)
    labels[:3] = "rare"
    return ad.AnnData(
        sp.csr_matrix(rng.poisson(1.5, (200, 12)).astype(np.float32)),
        obs=pd.DataFrame(
            {
                "perturbation": pd.Categorical(labels),
                "library": pd.array(rng.integers(50, 90, 200), dtype="Int32"),
            },
            index=[f"cell{i}" for i in range(200)],
        ),
        var=pd.DataFrame(index=[f"g{i}" for i in range(12)]),
    )


def brute_force(adata, condition, controls=("control",), library=None, scale=1e4) -> np.ndarray:
    counts = adata.X.toarray().astype(float)
    size = counts.sum(1) if library is None else adata.obs[library].to_numpy(float)
    expression = np.log2(1 + scale * counts / size[:, None])
    labels = adata.obs["perturbation"]
    return expression[labels == condition].mean(0) - expression[labels.isin(controls)].mean(0)


def observe(adata, **kwargs) -> ad.AnnData:
    arguments = {"perturbation_key": "perturbation", "control": "control"} | kwargs
    return observed_effects(adata, **arguments)


class TestObserved:
    def test_agrees_with_brute_force(self, screen):
        observed = observe(screen)
        assert list(observed.obs_names) == ["A", "A+B", "B", "NT", "rare"]
        assert list(observed.var_names) == list(screen.var_names)
        for name in observed.obs_names:
            np.testing.assert_allclose(
                observed[name].X.ravel(), brute_force(screen, name), rtol=1e-5, atol=1e-6
            )
            n_cells = (screen.obs["perturbation"] == name).sum()
            assert observed.obs.loc[name, "n_cells"] == n_cells
        n_control = (screen.obs["perturbation"] == "control").sum()
        assert observed.uns["n_control_cells"] == n_control

    def test_standard_errors_agree_with_brute_force(self, screen):
        observed = observe(screen)
        counts = screen.X.toarray().astype(float)
        expression = np.log2(1 + 1e4 * counts / counts.sum(1, keepdims=True))
        labels = screen.obs["perturbation"]

        def squared_error(name):
            return expression[labels == name].var(0, ddof=1) / (labels == name).sum()

        control = squared_error("control")
        np.testing.assert_allclose(observed.var["control_standard_error"], control**0.5, rtol=1e-5)
        mean = expression[labels == "control"].mean(0)
        np.testing.assert_allclose(observed.var["control_mean"], mean, rtol=1e-5)
        for name in observed.obs_names:
            error = observed[name].layers["standard_error"].ravel()
            np.testing.assert_allclose(error, (squared_error(name) + control) ** 0.5, rtol=1e-5)

    def test_standard_error_is_that_of_repeated_screens(self):
        rng = np.random.default_rng(0)
        counts = rng.poisson(3, (300, 40, 5))
        labels = np.repeat(["control", "A"], [25, 15])
        effects, errors = [], []
        for repeat in counts:
            cells = pd.DataFrame({"perturbation": labels}, index=[f"cell{i}" for i in range(40)])
            observed = observe(ad.AnnData(repeat + 1.0, obs=cells))
            effects.append(observed.X.ravel())
            errors.append(observed.layers["standard_error"].ravel() ** 2)
        np.testing.assert_allclose(np.var(effects, axis=0), np.mean(errors, axis=0), rtol=0.25)

    def test_one_cell_has_no_standard_error(self, screen):
        one = screen[(screen.obs["perturbation"] != "rare") | (screen.obs_names == "cell0")].copy()
        observed = observe(one)
        assert np.isnan(observed["rare"].layers["standard_error"]).all()
        assert np.isfinite(observed["rare"].X).all()

    def test_several_controls_a_library_and_a_scale(self, screen):
        observed = observe(
            screen, control=["control", "NT"], size_factor_key="library", scale=100.0
        )
        assert "NT" not in observed.obs_names
        expected = brute_force(screen, "A+B", ["control", "NT"], "library", 100.0)
        np.testing.assert_allclose(observed["A+B"].X.ravel(), expected, rtol=1e-5, atol=1e-6)

    def test_storage_and_chunks_make_no_difference(self, screen, monkeypatch, tmp_path):
        expected = observe(screen).X
        screen.write_h5ad(tmp_path / "screen.h5ad")
        screen.layers["csc"], screen.layers["dense"] = screen.X.tocsc(), screen.X.toarray()
        monkeypatch.setattr(tables, "CELLS_PER_CHUNK", 7)
        for layer in (None, "csc", "dense"):
            np.testing.assert_allclose(observe(screen, layer=layer).X, expected, atol=1e-6)
        backed = ad.read_h5ad(tmp_path / "screen.h5ad", backed="r")
        np.testing.assert_allclose(observe(backed).X, expected, atol=1e-6)
        backed.file.close()

    def test_leaves_the_screen_as_it_was(self, screen):
        before = screen.copy()
        observe(screen, size_factor_key="library")
        assert (screen.X != before.X).nnz == 0
        assert screen.X.dtype == np.float32

    def test_conditions_in_the_order_wanted(self, screen):
        observed = observe(screen, conditions=["B", "A"])
        assert list(observed.obs_names) == ["B", "A"]
        np.testing.assert_array_equal(observed.X, observe(screen)[["B", "A"]].X)
        in_other_order = observe(screen, conditions=["B+A"])
        assert list(in_other_order.obs_names) == ["B+A"]
        np.testing.assert_array_equal(in_other_order.X, observe(screen)["A+B"].X)

    def test_min_cells(self, screen):
        assert "rare" not in observe(screen, min_cells=4).obs_names
        with pytest.raises(ScreenError, match="fewer than 4 cells, the first 'rare' with 3"):
            observe(screen, conditions=["A", "rare"], min_cells=4)

    def test_cells_without_a_label_are_left_out(self, screen):
        labels = screen.obs["perturbation"].copy()
        labels[labels == "NT"] = np.nan
        full = observe(screen)
        screen.obs["perturbation"] = labels
        np.testing.assert_array_equal(observe(screen).X, full[["A", "A+B", "B", "rare"]].X)

    def test_refusals_name_the_culprit(self, screen):
        with pytest.raises(ScreenError, match="no column 'guide' in adata.obs. It has 'pert"):
            observe(screen, perturbation_key="guide")
        with pytest.raises(ScreenError, match="No cell has the control label 'DMSO'"):
            observe(screen, control="DMSO")
        with pytest.raises(ScreenError, match="no layer 'raw'"):
            observe(screen, layer="raw")
        with pytest.raises(ScreenError, match="No cell has the conditions 'C'"):
            observe(screen, conditions=["C"])
        with pytest.raises(ScreenError, match="'control' is the control"):
            observe(screen, conditions=["A", "control"])
        with pytest.raises(ScreenError, match="names one twice"):
            observe(screen, conditions=["A+B", "B+A"])
        empty = screen.copy()
        empty.X[4] = 0
        with pytest.raises(ScreenError, match="'cell4' has library size 0"):
            observe(empty)
        screen.obs["library"] = screen.obs["library"].mask(screen.obs_names == "cell7")
        with pytest.raises(ScreenError, match="'cell7' has library size nan"):
            observe(screen, size_factor_key="library")


class TestBatches:
    @pytest.fixture
    def screen(self):
        """Two batches: in the second, gene 0 is high in every cell; A is mostly there."""
        rng = np.random.default_rng(0)
        batch = np.repeat(["one", "two"], 300)
        label = np.concatenate(
            [
                np.repeat(["control", "A", "B"], [200, 20, 80]),
                np.repeat(["control", "A"], [100, 200]),
            ]
        )
        rate = np.full((600, 4), 20.0)
        rate[batch == "two", 0] *= 4
        rate[label == "A", 1] *= 3
        obs = pd.DataFrame({"perturbation": label, "batch": batch})
        obs.index = obs.index.astype(str)
        return ad.AnnData(rng.poisson(rate).astype(np.float32), obs=obs.assign(library=200.0))

    def test_one_batch_is_no_batch(self, screen):
        screen.obs["all"] = "one"
        matched = observed_effects(screen, "perturbation", "control", batch_key="all")
        plain = observed_effects(screen, "perturbation", "control")
        np.testing.assert_array_equal(matched.X, plain.X)
        np.testing.assert_array_equal(
            matched.layers["standard_error"], plain.layers["standard_error"]
        )
        pd.testing.assert_frame_equal(matched.var, plain.var)

    def test_each_cell_is_compared_with_its_own_batch(self, screen):
        matched = observed_effects(
            screen, "perturbation", "control", batch_key="batch", size_factor_key="library"
        )
        expression = np.log2(1 + 1e4 * screen.X / 200)
        obs = screen.obs

        def mean(label, batch):
            return expression[(obs["perturbation"] == label) & (obs["batch"] == batch)].mean(0)

        expected = sum(
            share * (mean("A", batch) - mean("control", batch))
            for batch, share in (("one", 20 / 220), ("two", 200 / 220))
        )
        np.testing.assert_allclose(matched["A"].X[0], expected, rtol=1e-4, atol=1e-5)
        assert abs(matched["A"].X[0, 0]) < 0.1 < 1 < matched["A"].X[0, 1]

    def test_standard_errors_are_those_over_many_screens(self):
        rng = np.random.default_rng(1)
        effects, errors = [], []
        obs = pd.DataFrame(
            {
                "perturbation": np.tile(["control", "A"], 30),
                "batch": np.repeat(["one", "two"], [40, 20]),
                "library": 100.0,
            }
        )
        obs.index = obs.index.astype(str)
        for _ in range(150):
            counts = rng.poisson(np.where(obs["batch"] == "one", 5, 30)[:, None], (60, 3)) + 1.0
            table = observed_effects(
                ad.AnnData(counts, obs=obs),
                "perturbation",
                "control",
                batch_key="batch",
                size_factor_key="library",
            )
            effects.append(table.X[0])
            errors.append(table.layers["standard_error"][0])
        np.testing.assert_allclose(np.mean(errors, 0), np.std(effects, 0), rtol=0.2)

    def test_a_batch_without_controls_is_compared_with_all(self, screen):
        kept = screen[
            ~((screen.obs["batch"] == "one") & (screen.obs["perturbation"] == "control"))
        ].copy()
        matched = observed_effects(
            kept, "perturbation", "control", batch_key="batch", size_factor_key="library"
        )
        plain = observed_effects(kept, "perturbation", "control", size_factor_key="library")
        np.testing.assert_allclose(matched["B"].X, plain["B"].X, atol=1e-5)

    def test_min_cells_and_order_of_parts(self, screen):
        screen.obs["perturbation"] = screen.obs["perturbation"].replace({"A": "Z+A"})
        matched = observed_effects(screen, "perturbation", "control", min_cells=100)
        assert list(matched.obs_names) == ["A+Z"]

    def test_a_cell_without_a_batch_is_an_error(self, screen):
        screen.obs.loc["3", "batch"] = None
        with pytest.raises(ScreenError, match="1 cells have no batch"):
            observed_effects(screen, "perturbation", "control", "batch")
