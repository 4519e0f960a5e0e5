from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scvi_sams._exceptions import ScreenError
from scvi_sams.evaluation import interaction_residuals, observed_effects


@pytest.fixture
def effects() -> pd.DataFrame:
    values = np.random.default_rng(0).normal(size=(6, 10))
    return pd.DataFrame(values, index=["A", "B", "C", "A+B", "A+B+C", "A+X"]).add_prefix("g")


class TestResiduals:
    def test_agree_with_the_formula(self, effects):
        residuals = interaction_residuals(effects).to_df()
        assert list(residuals.index) == ["A+B", "A+B+C"]
        expected = effects.loc["A+B"] - effects.loc["A"] - effects.loc["B"]
        np.testing.assert_allclose(residuals.loc["A+B"], expected)
        np.testing.assert_allclose(
            residuals.loc["A+B+C"], effects.loc["A+B+C"] - effects.loc[["A", "B", "C"]].sum()
        )

    def test_combinations_asked_for(self, effects):
        assert list(interaction_residuals(effects, ["A+B+C"]).obs_names) == ["A+B+C"]
        with pytest.raises(ScreenError, match=r"'A\+X' needs 'X', which is not in `effects`"):
            interaction_residuals(effects, ["A+X"])
        with pytest.raises(ScreenError, match="'A' is no combination joined by"):
            interaction_residuals(effects, ["A"])
        with pytest.raises(ScreenError, match="No condition of `effects` joins parts by '_'"):
            interaction_residuals(effects, combination_delimiter="_")

    def test_twice_the_same(self, effects):
        doubled = effects.rename(index={"A+B": "A+A"})
        residuals = interaction_residuals(doubled, ["A+A"]).to_df()
        np.testing.assert_allclose(residuals.loc["A+A"], doubled.loc["A+A"] - 2 * doubled.loc["A"])

    def test_the_additive_prediction_has_none(self, effects):
        effects.loc["A+B"] = effects.loc["A"] + effects.loc["B"]
        residuals = interaction_residuals(effects.astype(np.float32)).to_df()
        assert (residuals.loc["A+B"] == 0).all()  # not what single precision leaves

    def test_standard_errors_are_those_of_repeated_screens(self):
        rng = np.random.default_rng(1)
        n_cells = {"control": 30, "A": 20, "B": 15, "A+B": 10}
        cells = pd.DataFrame(
            {"perturbation": np.repeat(list(n_cells), list(n_cells.values()))},
            index=[f"cell{i}" for i in range(75)],
        )
        residuals, errors = [], []
        for counts in rng.poisson(4, (400, 75, 6)):
            screen = ad.AnnData(counts + 1.0, obs=cells)
            observed = observed_effects(screen, "perturbation", "control")
            found = interaction_residuals(observed)
            residuals.append(found.X[0])
            errors.append(found.layers["standard_error"][0] ** 2)
        np.testing.assert_allclose(np.var(residuals, axis=0), np.mean(errors, axis=0), rtol=0.2)

    def test_a_single_cell_has_no_standard_error(self, effects):
        observed = ad.AnnData(effects)
        observed.layers["standard_error"] = np.where(effects.index == "C", np.nan, 1.0)[
            :, None
        ] * (np.ones(effects.shape))
        errors = interaction_residuals(observed).layers["standard_error"]
        np.testing.assert_allclose(errors[0], 3**0.5)
        assert np.isnan(errors[1]).all()
