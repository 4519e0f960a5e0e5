"""Every member of the family can do what the family promises, or says why not."""

from __future__ import annotations

import numpy as np
import pytest

from scvi_sams import SAMSVAE, ScreenError, SVAEPlus, tl
from scvi_sams import UnknownPerturbationError as UnknownError
from scvi_sams.evaluation import effect_correlation, mask_recovery

from ._members import (
    COVARIATE_CASES,
    MEMBERS,
    SHIFTED,
    SPARSE,
    fit_member,
    read_outs,
    tiny_screen,
)
from ._simulations import fit_recovery, recovery_screen, true_effects
from .conftest import COVARIATES, QUIET, SETUP

CONDITIONS = ["P001", "P004"]


@pytest.fixture(scope="module")
def members():
    """Every member by name and whether it has covariates, fitted when first asked for."""
    fitted: dict[tuple[str, bool], object] = {}

    def get(member: str, covariates: bool = False):
        key = (member, covariates)
        if key not in fitted:
            encoder = {"encode_covariates": True} if covariates else {}
            fitted[key] = fit_member(member, covariates=covariates, **encoder)
        return fitted[key]

    return get


@pytest.fixture(params=COVARIATE_CASES)
def with_covariates(request):
    return request.param == "covariates"


@pytest.fixture(params=MEMBERS)
def member(request):
    return request.param


@pytest.fixture
def model(members, member, with_covariates):
    return members(member, with_covariates)


class TestReadOuts:
    def test_training(self, model):
        loss = model.history["reconstruction_loss_train"].to_numpy(dtype=float).ravel()
        assert np.isfinite(loss).all()
        assert loss[-1] < loss[0]

    def test_latent(self, model):
        latent = model.get_latent_representation()
        assert latent.shape == (300, 6)
        assert latent.std(0).min() > 0
        mean, variance = model.get_latent_representation(return_dist=True)
        np.testing.assert_array_equal(mean, latent)
        assert (variance > 0).all()

    def test_predict(self, model, with_covariates):
        cells = model.predict(["control", *CONDITIONS], n_samples=5)
        assert cells.shape == (15, 40)
        counts = cells.X.toarray()
        assert (counts >= 0).all()
        assert (counts == counts.round()).all()
        if with_covariates:
            assert set(cells.obs["batch"]) <= {"replicate_1", "replicate_2"}

    def test_predict_a_batch(self, members, member):
        model = members(member, True)
        first, second = (
            model.predict(CONDITIONS, n_samples=5, batch=f"replicate_{batch}", return_mean=True)
            for batch in (1, 2)
        )
        assert not np.array_equal(first.X, second.X)
        with pytest.raises(ScreenError, match=r"replicate_1, replicate_2"):
            model.predict(CONDITIONS, batch="replicate_3")

    def test_effects(self, model):
        effect = model.get_average_treatment_effect(n_samples=4, n_cells=10)
        assert effect.obs_names.tolist() == model.perturbation_names
        assert np.abs(effect.X).max(1).min() > 0 or model.module.effects is not None
        is_uncertain = model.module.effects is not None
        for name in ("lower", "upper", "std"):
            assert np.isfinite(effect.layers[name]).all() == is_uncertain
            assert np.isnan(effect.layers[name]).all() == (not is_uncertain)
        if is_uncertain:
            assert (effect.layers["lower"] <= effect.layers["upper"]).all()

    def test_bounds(self, model):
        cells = np.arange(40)
        bound = model.get_iwelbo(indices=cells, n_particles=20, return_mean=False)
        elbo = model.get_elbo(indices=cells, include_global=False, return_mean=False)
        assert bound.shape == elbo.shape == (40,)
        assert bound.mean() > elbo.mean()

    def test_unknown_condition(self, model):
        with pytest.raises(UnknownError, match=r"P0O1.*P001"):
            model.predict(["P0O1"])


class TestMissingMethods:
    """A method without meaning for a member says why, and what to use in its place."""

    @pytest.mark.parametrize(
        ("names", "method", "message"),
        [
            (("CPAVAE",), "get_perturbation_mask", r"no masks.*get_perturbation_effect"),
            (("CPAVAE",), "mask_prior", r"no masks.*mask_prior below one"),
            (("ConditionalVAE",), "get_perturbation_mask", r"networks.*average_treatment_effect"),
            (("ConditionalVAE",), "mask_prior", r"networks.*SAMSVAE or CPAVAE"),
            (("ConditionalVAE",), "get_perturbation_effect", r"networks.*SAMSVAE or CPAVAE"),
            (SHIFTED, "interaction_effects", r"sum of their parts.*interactions=True"),
            (("ConditionalVAE",), "interaction_effects", r"networks.*average_treatment_effect"),
            (tuple(MEMBERS), "dose_response", r"SAMSVAE or CPAVAE.*dose_response='hill'"),
            (tuple(MEMBERS), "direct_effects", r"SAMSVAE or CPAVAE.*direct_effects=True"),
            (tuple(MEMBERS), "get_latent_library_size", r"no latent library.*size_factor_key"),
            (tuple(MEMBERS), "get_marginal_ll", r"get_iwelbo"),
        ],
    )
    def test_raises(self, members, names, method, message):
        for name in names:
            function = getattr(tl, method, None) or getattr(SAMSVAE, method)
            with pytest.raises(NotImplementedError, match=message):
                function(members(name))

    def test_shifts_of_networks(self, members):
        model = members("ConditionalVAE")
        with pytest.raises(NotImplementedError, match="ConditionalVAE perturbations act through"):
            model.get_perturbation_shift(["P001"])
        with pytest.raises(NotImplementedError, match="representation='perturbation'"):
            model.get_latent_representation(representation="perturbation")
        np.testing.assert_array_equal(
            model.get_latent_representation(representation="basal"),
            model.get_latent_representation(),
        )

    @pytest.mark.parametrize("name", SHIFTED)
    def test_state_is_basal_plus_shift(self, members, name):
        model = members(name)
        full, basal, shift = (
            model.get_latent_representation(representation=representation)
            for representation in ("full", "basal", "perturbation")
        )
        np.testing.assert_allclose(full, basal + shift, atol=1e-5)
        is_control = (model.adata.obs["perturbation"] == "control").to_numpy()
        assert not shift[is_control].any()
        assert shift[~is_control].any()

    @pytest.mark.parametrize("name", SPARSE)
    def test_masks(self, members, name):
        mask = members(name).get_perturbation_mask()
        assert mask.index.tolist() == members(name).perturbation_names
        assert ((mask >= 0) & (mask <= 1)).all(axis=None)
        assert mask.to_numpy().std() > 0


class TestSaveLoad:
    def test_with_adata(self, model, member, tmp_path):
        model.save(str(tmp_path / "model"))
        loaded = MEMBERS[member].load(
            str(tmp_path / "model"), model.adata.copy(), accelerator="cpu"
        )
        _assert_same(read_outs(loaded, CONDITIONS), read_outs(model, CONDITIONS))
        assert loaded.perturbation_names == model.perturbation_names

    def test_without_adata(self, model, member, tmp_path):
        model.save(str(tmp_path / "model"))
        loaded = MEMBERS[member].load(str(tmp_path / "model"), adata=False, accelerator="cpu")
        assert loaded.adata is None
        _assert_same(
            read_outs(loaded, CONDITIONS, with_cells=False),
            read_outs(model, CONDITIONS, with_cells=False),
        )

    def test_another_class(self, members, tmp_path):
        members("CPAVAE").save(str(tmp_path / "model"))
        with pytest.raises(ValueError, match="different class"):
            SAMSVAE.load(str(tmp_path / "model"), tiny_screen(), accelerator="cpu")


def test_same_seed_same_bits(members, member, with_covariates):
    encoder = {"encode_covariates": True} if with_covariates else {}
    first = read_outs(members(member, with_covariates), CONDITIONS)
    again = fit_member(member, covariates=with_covariates, **encoder)
    _assert_same(read_outs(again, CONDITIONS), first)
    other = fit_member(member, covariates=with_covariates, seed=1, **encoder)
    assert not np.array_equal(read_outs(other, CONDITIONS)["latent"], first["latent"])


def test_cpa_is_sams_without_sparsity(with_covariates):
    models = [
        fit_member("CPAVAE", covariates=with_covariates),
        fit_member("SAMSVAE", covariates=with_covariates, mask_prior=1.0),
    ]
    cpa, sams = (model.module.state_dict() for model in models)
    assert cpa.keys() == sams.keys()
    for name, value in cpa.items():
        np.testing.assert_array_equal(value, sams[name], err_msg=name)
    _assert_same(*(read_outs(model, ["P001+P006"]) for model in models))
    with pytest.raises(NotImplementedError, match="SAMSVAE as it was made has no masks"):
        models[1].get_perturbation_mask()


class TestSVAEPlusCombinations:
    def test_own(self):
        model = fit_member("SVAEPlus")
        pairs = {label for label in model.adata.obs["perturbation"] if "+" in label}
        assert len(pairs) == 3
        assert pairs <= set(model.perturbation_names)
        assert len(model.perturbation_names) == 9
        (measured, *_) = sorted(pairs)
        assert model.predict([measured], n_samples=2).n_obs == 2
        shift = model.get_perturbation_shift([measured, *measured.split("+")])
        assert not np.allclose(shift.iloc[0], shift.iloc[1] + shift.iloc[2])
        unmeasured = next(
            pair for pair in ("P001+P002", "P001+P003", "P002+P003", "P001+P004")
            if pair not in pairs
        )  # fmt: skip
        with pytest.raises(UnknownError, match=unmeasured.replace("+", r"\+")):
            model.predict([unmeasured])

    def test_additive(self):
        model = fit_member("SVAEPlus", setup={"combinations": "additive"})
        assert len(model.perturbation_names) == 6
        shift = model.get_perturbation_shift(["P001", "P006", "P001+P006"])
        np.testing.assert_allclose(shift.iloc[2], shift.iloc[0] + shift.iloc[1], rtol=1e-5)

    def test_dosage_matrix(self):
        adata = tiny_screen()
        adata.obsm["doses"] = (
            adata.obs["perturbation"].astype(str).str.get_dummies("+").drop(columns="control")
        )
        arguments = {"layer": "counts", "dosage_key": "doses"}
        several = adata.obs_names[adata.obsm["doses"].sum(axis=1) > 1]
        with pytest.raises(ScreenError, match=rf"{len(several)} cells.*{several[0]}.*additive"):
            SVAEPlus.setup_anndata(adata, **arguments)
        SVAEPlus.setup_anndata(adata, **arguments, combinations="additive")
        model = SVAEPlus(adata, n_latent=4, n_hidden=8)
        model.train(max_epochs=1, **QUIET)
        assert model.perturbation_names == [f"P00{number}" for number in range(1, 7)]
        singles = adata[adata.obsm["doses"].sum(axis=1) < 2].copy()
        SVAEPlus.setup_anndata(singles, **arguments)

    def test_unknown(self):
        with pytest.raises(ValueError, match="combinations='sum'.*'own' or 'additive'"):
            SVAEPlus.setup_anndata(tiny_screen(), **SETUP, combinations="sum")

    def test_survives_loading(self, tmp_path):
        model = fit_member("SVAEPlus", setup={"combinations": "additive"}, max_epochs=2)
        model.save(str(tmp_path / "model"))
        loaded = SVAEPlus.load(str(tmp_path / "model"), tiny_screen(), accelerator="cpu")
        assert loaded.perturbation_names == model.perturbation_names
        _assert_same(read_outs(loaded, ["P001+P006"]), read_outs(model, ["P001+P006"]))


def test_setup_is_the_same_for_all(member, with_covariates, capsys):
    adata = tiny_screen()
    MEMBERS[member].setup_anndata(adata, **SETUP, **(COVARIATES if with_covariates else {}))
    model = MEMBERS[member](adata)
    repr(model)  # scvi-tools prints it
    assert f"{member} with " in capsys.readouterr().out
    assert model.module.n_latent == 40


def _assert_same(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        np.testing.assert_array_equal(value, right[name], err_msg=name)


@pytest.mark.slow
class TestRecovery:
    """Each member recovers a simulation of what it can express."""

    DENSE = {"mask_probability": 1.0, "effect_size": 0.7, "effect_jitter": 0.5}
    PAIRS = {"n_pairs": 5, "n_perturbations": 10}

    @pytest.mark.parametrize(
        ("member", "screen", "least"),
        [
            ("SAMSVAE", {}, 0.95),
            ("CPAVAE", DENSE, 0.95),
            ("SVAEPlus", {}, 0.9),
            ("ConditionalVAE", {}, 0.85),
        ],
    )
    def test_effects(self, member, screen, least):
        adata = recovery_screen(**screen)
        model = fit_recovery(member, adata)
        truth = true_effects(model.perturbation_names, **screen)
        assert effect_correlation(model.get_average_treatment_effect(), truth) > least
        if member == "SAMSVAE":
            masks = mask_recovery(adata.uns["truth"]["mask"], model.get_perturbation_mask())
            assert masks.f1 > 0.9

    def test_pairs_of_additive_svae_plus(self):
        """The extension of SVAE+ predicts pairs from their parts alone."""
        adata = recovery_screen(**self.PAIRS)
        pairs = sorted(label for label in adata.obs["perturbation"].unique() if "+" in label)
        seen = adata[~adata.obs["perturbation"].isin(pairs)].copy()
        model = fit_recovery("SVAEPlus", seen, setup={"combinations": "additive"})
        truth = true_effects(pairs, **self.PAIRS)
        assert effect_correlation(model.get_average_treatment_effect(pairs), truth) > 0.85

    @pytest.mark.parametrize("is_sparse", [True, False])
    def test_sparsity_pays_where_it_is_true(self, is_sparse):
        """Held-out cells, paired, with twenty cells a perturbation to learn from.

        Masks gain where the truth is sparse, and are found beside. Where it is dense they lose no
        more than noise (three standard errors) and 0.2 of some 300 nats.
        """
        screen = {"n_cells": 3_200, "n_perturbations": 60, "n_latent": 8}
        screen |= {"mask_probability": 0.1} if is_sparse else self.DENSE
        adata = recovery_screen(**screen)
        cells = np.arange(adata.n_obs)
        seen, held_out = cells[:1_200], cells[1_200:]
        bounds = {}
        for member in ("SAMSVAE", "CPAVAE"):
            model = fit_recovery(
                member,
                adata,
                max_epochs=80,
                train={"datasplitter_kwargs": {"external_indexing": [seen, held_out]}},
            )
            bounds[member] = model.get_iwelbo(indices=held_out, n_particles=25, return_mean=False)
            if member == "SAMSVAE" and is_sparse:
                truth = adata.uns["truth"]["mask"]
                assert mask_recovery(truth, model.get_perturbation_mask()).f1 > 0.9
        gain = bounds["SAMSVAE"] - bounds["CPAVAE"]
        error = gain.std() / len(gain) ** 0.5
        assert gain.mean() > (3 * error if is_sparse else -(0.2 + 3 * error))
