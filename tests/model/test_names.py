"""Genes are told by name: every method that is given an AnnData answers for the model's genes."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scvi

from scvi_sams import SAMSVAE, ScreenError, evaluation, tl

from .conftest import SETUP, small_screen


@pytest.fixture
def reordered(fitted):
    adata = fitted.adata.copy()
    return adata[:, np.random.default_rng(0).permutation(adata.n_vars)].copy()


CELLS = [3, 1, 2]
READ_OUTS = {
    "latent": lambda m, a: m.get_latent_representation(a, CELLS),
    "elbo": lambda m, a: m.get_elbo(a, CELLS, n_samples=2),
    "iwelbo": lambda m, a: m.get_iwelbo(a, CELLS, n_particles=2),
    "expression": lambda m, a: m.get_normalized_expression(a, CELLS),
    "reconstruction": lambda m, a: m.get_reconstruction_error(a, CELLS)["reconstruction_loss"],
    "predictive": lambda m, a: m.posterior_predictive_sample(a, CELLS).todense(),
    "predict": lambda m, a: m.predict(["P001"], basal=a[CELLS].copy()).X.toarray(),
    "expression_de": lambda m, a: m.differential_expression(
        a, groupby="perturbation", group1="P001", group2="control", silent=True
    )[["raw_mean1", "raw_mean2"]],
    "programs": lambda m, a: (tl.write_results(m, a), a.varm["sams_programs"])[1].loc[
        m.get_var_names()
    ],
}


@pytest.mark.parametrize("read_out", READ_OUTS)
def test_other_order_same_answers(fitted, reordered, read_out):
    found = []
    for adata in (fitted.adata.copy(), reordered):
        scvi.settings.seed = 1
        found.append(READ_OUTS[read_out](fitted, adata))
    if hasattr(found[0], "sort_index"):
        assert set(found[0].columns) == set(found[1].columns)
        found = [table.sort_index()[sorted(table.columns)].to_numpy(float) for table in found]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_leaves_the_users_object(fitted, reordered):
    before = list(reordered.var_names)
    fitted.get_latent_representation(reordered)
    assert list(reordered.var_names) == before
    assert "_scvi_uuid" not in reordered.uns or reordered.uns is not fitted.adata.uns


def test_scorecard(fitted, reordered):
    kwargs = {"train_indices": np.arange(300)}
    tables = []
    for adata in (fitted.adata, reordered):
        other = adata[300:].copy()
        scvi.settings.seed = 1
        card = evaluation.scorecard(fitted, other, **kwargs)
        tables.append(card.summary.select_dtypes("number"))
    np.testing.assert_allclose(tables[1], tables[0], rtol=1e-4, atol=1e-5)


def test_other_genes(fitted):
    adata = small_screen()
    adata.var_names = ["gene_01", *(f"other_{k}" for k in range(1, adata.n_vars))]
    for call in (
        fitted.get_latent_representation,
        fitted.get_elbo,
        fitted.get_normalized_expression,
        lambda a: SAMSVAE.load_query_data(a, fitted),
        lambda a: fitted.predict(["P001"], basal=a),
    ):
        with pytest.raises(ScreenError, match="lacks 79: 'gene_02'"):
            call(adata)
    more = small_screen(n_genes=81)
    more.var_names = [*fitted.get_var_names(), "extra"]
    with pytest.raises(ScreenError, match=r"has not \(1\): 'extra'"):
        fitted.get_elbo(more)


def test_query_in_other_order(fitted, reordered):
    query = SAMSVAE.load_query_data(reordered, fitted)
    assert list(query.adata.var_names) == list(fitted.get_var_names())


def test_load_in_other_order(fitted, reordered, tmp_path):
    fitted.save(tmp_path / "model")
    loaded = SAMSVAE.load(tmp_path / "model", reordered)
    assert list(loaded.adata.var_names) == list(fitted.get_var_names())
    np.testing.assert_allclose(
        loaded.get_latent_representation(),
        fitted.get_latent_representation(),
        rtol=1e-5,
        atol=1e-6,
    )


def test_backed_says_how(fitted, reordered, tmp_path):
    reordered.write_h5ad(tmp_path / "screen.h5ad")
    backed = ad.read_h5ad(tmp_path / "screen.h5ad", backed="r")
    with pytest.raises(ScreenError, match="to_memory"):
        fitted.get_elbo(backed)
    backed.file.close()


class TestRegistration:
    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (["dup", "dup"], "more than once: 'dup'.*make_unique"),
            (["nan", "b"], r"without a name \(1\), at positions '0'"),
            (["", "<NA>"], r"without a name \(2\)"),
        ],
    )
    def test_names(self, screen, names, message):
        screen.var_names = [*names, *screen.var_names[2:]]
        with pytest.raises(ScreenError, match=message):
            SAMSVAE.setup_anndata(screen, **SETUP)

    @pytest.mark.parametrize("kind", ["CRISPR Guide Capture", "Antibody Capture"])
    def test_features_that_are_no_genes(self, screen, kind):
        screen.var["feature_types"] = [kind] * 2 + ["Gene Expression"] * (screen.n_vars - 2)
        with pytest.raises(ScreenError, match=f"{kind}.*{screen.var_names[1]}.*Gene Expression"):
            SAMSVAE.setup_anndata(screen, **SETUP)

    def test_what_is_no_anndata(self, screen, fitted, tmp_path):
        class MuData:
            mod = {"rna": screen}

        class AnnCollection:
            pass

        for what, message in (
            (tmp_path / "a.h5ad", "read_h5ad"),
            ("a.h5ad", "read_h5ad"),
            (screen.to_df(), r"AnnData\(frame"),
            (MuData(), r"'rna'.*mdata\['rna'\]"),
            (AnnCollection(), "to_adata"),
            (None, "pass an AnnData"),
        ):
            with pytest.raises(ScreenError, match=message):
                SAMSVAE.setup_anndata(what, **SETUP)
            if what is not None:
                with pytest.raises(ScreenError, match=message):
                    fitted.get_elbo(what)
