"""Log fold changes of the genes that perturbations target."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from scvi_sams import CPAVAE, SAMSVAE, ScreenError, UnknownPerturbationError, tl
from scvi_sams.module.doses import Doses

from ._members import fit_member, tiny_screen
from .conftest import SETUP, SIZE

KEPT = 0.15  # share of a target that is left under its knock-down


def knockdown_screen(n_named=4, **kwargs):
    """Genes are named like the first perturbations, which knock them down."""
    adata = tiny_screen(**kwargs)
    counts = adata.layers["counts"].toarray()
    abundant = np.argsort(counts.mean(0))[::-1][:n_named]
    names = adata.var_names.to_numpy(dtype=object).copy()
    targets = [f"P00{number}" for number in range(1, n_named + 1)]
    names[abundant] = targets
    adata.var_names = names
    rng = np.random.default_rng(0)
    for target, gene in zip(targets, abundant, strict=True):
        cells = adata.obs["perturbation"].astype(str).str.contains(target).to_numpy()
        counts[cells, gene] = rng.binomial(counts[cells, gene].astype(int), KEPT)
    adata.layers["counts"] = sparse.csr_matrix(counts)
    return adata


def make(direct_effects, adata=None, model_class=SAMSVAE):
    adata = knockdown_screen() if adata is None else adata
    model_class.setup_anndata(adata, **SETUP)
    return model_class(adata, direct_effects=direct_effects, **SIZE)


@pytest.fixture(scope="module", params=["closed_form", "gradient"])
def direct(request):
    return fit_member(
        "SAMSVAE",
        knockdown_screen(n_cells=800),
        max_epochs=15,
        global_inference=request.param,
    )


class TestArgument:
    @pytest.mark.parametrize("model_class", [SAMSVAE, CPAVAE])
    def test_by_default_where_names_are_genes(self, model_class):
        model = make(None, model_class=model_class)
        target = model.module.direct_effects.target.numpy()
        assert (target[:4] >= 0).all()
        assert (target[4:] == -1).all()
        assert model.adata.var_names[target[:4]].tolist() == model.perturbation_names[:4]
        assert make(None, tiny_screen(), model_class).module.direct_effects is None

    def test_true(self):
        found, default = (make(value).module.direct_effects.target for value in (True, None))
        np.testing.assert_array_equal(found, default)
        with pytest.raises(ScreenError, match=r"no perturbation is named like a gene.*a dict"):
            make(True, tiny_screen())

    def test_false(self):
        model = make(False)
        model.is_trained_ = True
        assert model.module.direct_effects is None
        with pytest.raises(NotImplementedError, match="direct_effects=True"):
            tl.direct_effects(model)

    def test_dict(self):
        model = make({"P005": "gene_07", "P002": "P003"})
        model.is_trained_ = True
        table = tl.direct_effects(model)
        assert table["gene"].to_dict() == {"P002": "P003", "P005": "gene_07"}

    def test_unknown_perturbation(self):
        with pytest.raises(UnknownPerturbationError, match=r"P0O5.*P005"):
            make({"P0O5": "gene_07"})

    def test_unknown_gene(self):
        with pytest.raises(ScreenError, match=r"not in adata\.var_names: gene_700\."):
            make({"P005": "gene_700"})


class TestReadOut:
    def test_knock_downs(self, direct):
        table = tl.direct_effects(direct)
        assert table.index.tolist() == direct.perturbation_names[:4]
        assert table["gene"].tolist() == direct.perturbation_names[:4]
        assert (table["lower"] < table["log2_fold_change"]).all()
        assert (table["log2_fold_change"] < table["upper"]).all()
        np.testing.assert_allclose(table["log2_fold_change"], np.log2(KEPT), atol=1.0)

    def test_level(self, direct):
        narrow, wide = (tl.direct_effects(direct, level) for level in (0.5, 0.9))
        ratio = (wide["upper"] - wide["lower"]) / (narrow["upper"] - narrow["lower"])
        np.testing.assert_allclose(ratio, 1.6449 / 0.6745, rtol=1e-3)
        with pytest.raises(ValueError, match="credible_level=1"):
            tl.direct_effects(direct, 1)

    def test_predictions_have_them(self, direct):
        """The knock-down of a target is in what is predicted of it."""
        effect = direct.get_average_treatment_effect().to_df()
        for target in direct.perturbation_names[:4]:
            assert effect.loc[target, target] < -1
        mean = direct.predict(["control", "P001"], n_samples=200, return_mean=True).to_df()
        assert mean.loc["P001", "P001"] < 0.4 * mean.loc["control", "P001"]

    @pytest.mark.parametrize("dose", [0.5, 1.0, 2.0])
    def test_doses_scale_them(self, direct, dose):
        """The log fold change against every other gene, all else the same."""
        module = direct.module
        names, genes = direct.perturbation_names, direct.adata.var_names
        with torch.inference_mode():
            draws = module.sample_globals(1)
            doses = Doses(torch.tensor([[names.index("P002")]]), torch.tensor([[dose]]))
            population = direct.counterfactual(n_cells=3).population
            own, none = (
                module.decode_condition(population, doses, draws._replace(direct=value)).scale
                for value in (draws.direct, torch.zeros_like(draws.direct))
            )
        change = (own / none).log().numpy()[0]
        target, other = genes.get_loc("P002"), genes.get_loc("P003")
        expected = dose * draws.direct[0, names.index("P002")].item()
        assert abs(expected) > 0.1
        np.testing.assert_allclose(change[:, target] - change[:, other], expected, rtol=1e-4)

    def test_latents_need_not_carry_them(self, direct):
        """Cells are more likely than under the model without."""
        paper = fit_member(
            "SAMSVAE",
            knockdown_screen(n_cells=800),
            max_epochs=15,
            direct_effects=False,
        )
        gain = direct.get_iwelbo(return_mean=False) - paper.get_iwelbo(return_mean=False)
        label = paper.adata.obs["perturbation"].isin(paper.perturbation_names[:4]).to_numpy()
        error = gain[label].std() / label.sum() ** 0.5
        assert gain[label].mean() > 3 * error

    def test_saved(self, direct, tmp_path):
        direct.save(str(tmp_path / "model"))
        for adata in (direct.adata.copy(), False):
            loaded = SAMSVAE.load(str(tmp_path / "model"), adata, accelerator="cpu")
            assert tl.direct_effects(loaded).equals(tl.direct_effects(direct))
