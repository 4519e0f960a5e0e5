"""The prior probability of masks, given or learned."""

from __future__ import annotations

import numpy as np
import pytest

from scvi_sams import SAMSVAE, tl

from ._members import fit_member, tiny_screen
from ._simulations import fit_recovery, recovery_screen
from .conftest import SETUP, SIZE

BETA = (1.0, 4.0)
SHARING = ["all", "latent", "perturbation"]


@pytest.fixture(scope="module", params=["closed_form", "gradient"])
def learned(request):
    """Models by what shares a probability, fitted when first asked for."""
    models = {}

    def get(shared_by):
        if shared_by not in models:
            models[shared_by] = fit_member(
                "SAMSVAE",
                mask_prior=BETA,
                mask_prior_shared_by=shared_by,
                global_inference=request.param,
                mask_evidence_cells=None,
            )
        return models[shared_by]

    return get


class TestGiven:
    def test_no_width(self):
        model = fit_member("SAMSVAE", mask_prior=0.1, max_epochs=2)
        prior = tl.mask_prior(model)
        assert prior.index.tolist() == ["all"]
        assert prior.columns.tolist() == ["mean", "lower", "upper"]
        np.testing.assert_allclose(prior.to_numpy(), 0.1, rtol=1e-6)
        assert model.get_perturbation_mask().attrs["mask_prior"] == pytest.approx(0.1)

    @pytest.mark.parametrize("mask_prior", [0.0, -0.1, 1.5])
    def test_out_of_range(self, mask_prior):
        with pytest.raises(ValueError, match=rf"mask_prior={mask_prior} .*> 0 and <= 1"):
            _make(mask_prior=mask_prior)

    @pytest.mark.parametrize("mask_prior", [(0.0, 1.0), (1.0, -1.0)])
    def test_no_beta(self, mask_prior):
        with pytest.raises(ValueError, match="pair of positive numbers"):
            _make(mask_prior=mask_prior)

    def test_unknown_sharing(self):
        with pytest.raises(ValueError, match="mask_prior_shared_by='gene'.*'all', 'latent'"):
            _make(mask_prior=BETA, mask_prior_shared_by="gene")


class TestLearned:
    @pytest.mark.parametrize("shared_by", SHARING)
    def test_table(self, learned, shared_by):
        model = learned(shared_by)
        prior = tl.mask_prior(model)
        index = {
            "all": ["all"],
            "latent": [f"latent_{latent}" for latent in range(6)],
            "perturbation": model.perturbation_names,
        }
        assert prior.index.tolist() == index[shared_by]
        assert (prior["lower"] < prior["mean"]).all()
        assert (prior["mean"] < prior["upper"]).all()
        attribute = model.get_perturbation_mask().attrs["mask_prior"]
        np.testing.assert_allclose(np.ravel(attribute), prior["mean"], rtol=1e-6)

    @pytest.mark.parametrize("shared_by", SHARING)
    def test_conjugate_to_the_masks(self, learned, shared_by):
        """The mean is that of a Beta posterior whose data are the masks."""
        model = learned(shared_by)
        mask = model.get_perturbation_mask().to_numpy(dtype=float)
        axes = {"all": (0, 1), "latent": 0, "perturbation": 1}[shared_by]
        a, b = BETA
        n_masks = mask.size / len(tl.mask_prior(model))
        expected = (a + mask.sum(axes)) / (a + b + n_masks)
        found = tl.mask_prior(model)["mean"]
        np.testing.assert_allclose(found, np.atleast_1d(expected), atol=0.02)

    def test_interval_narrows_with_its_level(self, learned):
        narrow, wide = (tl.mask_prior(learned("perturbation"), level) for level in (0.5, 0.95))
        assert (wide["lower"] < narrow["lower"]).all()
        assert (narrow["upper"] < wide["upper"]).all()
        with pytest.raises(ValueError, match="credible_level=0"):
            tl.mask_prior(learned("all"), 0)

    def test_saved(self, learned, tmp_path):
        for shared_by in SHARING:
            model = learned(shared_by)
            model.save(str(tmp_path / shared_by))
            loaded = SAMSVAE.load(str(tmp_path / shared_by), adata=False, accelerator="cpu")
            assert tl.mask_prior(loaded).equals(tl.mask_prior(model))

    def test_of_svae_plus(self):
        model = fit_member("SVAEPlus")
        prior = tl.mask_prior(model)
        assert prior.index.tolist() == model.perturbation_names
        assert prior["mean"].nunique() > 1
        fixed = tl.mask_prior(fit_member("SVAEPlus", mask_prior=0.2, max_epochs=2))
        np.testing.assert_allclose(fixed.to_numpy(), 0.2, rtol=1e-6)


def _make(**kwargs):
    adata = tiny_screen()
    SAMSVAE.setup_anndata(adata, **SETUP)
    return SAMSVAE(adata, **SIZE, **kwargs)


@pytest.mark.slow
def test_learns_the_density():
    """As many latents as the truth has: the masks that are on are as many as the truth's.

    Coarsened evidence leaves some probability to every mask that is off, so the learned
    probability lies above the share of masks that are on, never below.
    """
    adata = recovery_screen(n_perturbations=40, n_latent=6, mask_probability=0.15)
    model = fit_recovery("SAMSVAE", adata, n_latent=6, mask_prior=(1.0, 5.0))
    prior = tl.mask_prior(model).loc["all"]
    density = adata.uns["truth"]["mask"].mean()
    called = (model.get_perturbation_mask() > 0.5).to_numpy().mean()
    assert abs(called - density) < 0.03
    assert density < prior["mean"] < density + 0.12
    assert prior["upper"] - prior["lower"] < 0.15
