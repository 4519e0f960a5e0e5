"""Shifts of pairs beyond the sum of their parts."""

from __future__ import annotations

import numpy as np
import pytest

from scvi_sams import SAMSVAE, ScreenError, UnknownPerturbationError, tl
from scvi_sams.evaluation import mask_recovery

from ._members import fit_member, read_outs, tiny_screen
from ._simulations import fit_recovery, recovery_screen
from .conftest import SETUP, SIZE


def measured_pairs(adata):
    return sorted(label for label in adata.obs["perturbation"].unique() if "+" in label)


def interactions_of(model, column="effect"):
    table = tl.interaction_effects(model)
    return table.pivot(index="pair", columns="latent", values=column)


def make(interactions, adata=None, **setup):
    adata = tiny_screen() if adata is None else adata
    SAMSVAE.setup_anndata(adata, **(SETUP | setup))
    return SAMSVAE(adata, interactions=interactions, **SIZE)


@pytest.fixture(scope="module", params=["closed_form", "gradient"])
def paired(request):
    return fit_member(
        "SAMSVAE", interactions=True, interaction_prior=0.05, global_inference=request.param
    )


class TestReadOut:
    def test_tables(self, paired):
        mask, effect = interactions_of(paired, "inclusion_probability"), interactions_of(paired)
        assert mask.index.tolist() == effect.index.tolist() == measured_pairs(paired.adata)
        assert mask.columns.tolist() == paired.get_perturbation_mask().columns.tolist()
        assert ((mask >= 0) & (mask <= 1)).all(axis=None)
        assert np.abs(effect).to_numpy().max() > 0
        # Those of perturbations leave the pairs out.
        assert paired.get_perturbation_mask().index.tolist() == paired.perturbation_names
        assert paired.get_perturbation_effect().index.tolist() == paired.perturbation_names

    def test_shift_of_a_pair(self, paired):
        """The sum of the parts and, by the product of the doses, the interaction."""
        pair = measured_pairs(paired.adata)[0]
        first, second = pair.split("+")
        own = paired.module.effects.moments()[0][len(paired.perturbation_names)]
        own = own.detach().numpy()
        assert np.abs(own).max() > 0
        for a, b in ((1.0, 1.0), (0.5, 3.0)):
            shift = paired.get_perturbation_shift(
                [{first: a}, {second: b}, {first: a, second: b}]
            ).to_numpy()
            np.testing.assert_allclose(shift[2] - shift[0] - shift[1], a * b * own, atol=1e-5)

    def test_effect_is_that_of_the_shift(self):
        """Without the charge on reported masks, what is reported is what predicts."""
        model = fit_member("SAMSVAE", interactions=True, mask_evidence_cells=None)
        pairs = measured_pairs(model.adata)
        own = model.module.effects.moments()[0][-len(pairs) :].detach()
        np.testing.assert_allclose(interactions_of(model), own, atol=1e-6)

    def test_unmeasured_pairs_are_additive(self, paired):
        parts = ["P001", "P004"]
        assert "+".join(parts) not in measured_pairs(paired.adata)
        shift = paired.get_perturbation_shift([*parts, "+".join(parts)]).to_numpy()
        np.testing.assert_allclose(shift[2], shift[0] + shift[1], atol=1e-6)

    def test_triples_hold_their_pairs(self, paired):
        triple = ["P001", "P002", "P003"]
        own = paired.module.effects.moments()[0].detach().numpy()
        names = paired.perturbation_names
        inside = [
            own[len(names) + row]
            for row, (a, b) in enumerate(paired.module.interactions.pairs)
            if {names[a], names[b]} <= set(triple)
        ]
        assert inside
        shift = paired.get_perturbation_shift([*triple, "+".join(triple)]).to_numpy()
        np.testing.assert_allclose(shift[3], shift[:3].sum(0) + sum(inside), atol=1e-5)


class TestPairs:
    def test_named(self):
        model = make([("P004", "P001"), ("P002", "P003")])
        model.is_trained_ = True
        assert interactions_of(model, "inclusion_probability").index.tolist() == [
            "P001+P004",
            "P002+P003",
        ]

    def test_delimiter(self):
        adata = tiny_screen()
        adata.obs["perturbation"] = adata.obs["perturbation"].astype(str).str.replace("+", "_")
        model = make(True, adata, combination_delimiter="_")
        model.is_trained_ = True
        index = interactions_of(model, "inclusion_probability").index
        assert index.tolist() == [pair.replace("+", "_") for pair in measured_pairs(tiny_screen())]

    @pytest.mark.parametrize("interactions", [False, []])
    def test_none(self, interactions):
        assert make(interactions).module.effects.n_pairs == 0

    def test_unknown_name(self):
        with pytest.raises(UnknownPerturbationError, match=r"P0O2.*P002"):
            make([("P001", "P0O2")])

    @pytest.mark.parametrize("pairs", [[("P001", "P002"), ("P002", "P001")], [("P001", "P001")]])
    def test_not_distinct(self, pairs):
        with pytest.raises(ValueError, match="distinct"):
            make(pairs)

    def test_no_pairs(self):
        with pytest.raises(ScreenError, match=r"interactions=True, but no cell has two"):
            make(True, tiny_screen(n_pairs=0))

    def test_no_adata(self):
        registry = make(False).registry
        with pytest.raises(ScreenError, match=r"interactions=True needs the AnnData"):
            SAMSVAE(registry=registry, interactions=True)
        assert SAMSVAE(registry=registry, interactions=[("P001", "P002")]).module.effects.n_pairs


class TestSaved:
    def test_other_pairs(self, paired, tmp_path):
        """A model keeps its pairs, whichever the AnnData has that it is loaded with."""
        paired.save(str(tmp_path / "model"))
        other = tiny_screen()
        label = other.obs["perturbation"].astype(str)
        label = label.replace(dict.fromkeys(measured_pairs(other), "P005+P006"))
        other.obs["perturbation"] = label
        loaded = SAMSVAE.load(str(tmp_path / "model"), other, accelerator="cpu")
        np.testing.assert_array_equal(
            interactions_of(loaded, "inclusion_probability"),
            interactions_of(paired, "inclusion_probability"),
        )
        conditions = [*measured_pairs(paired.adata), "P005+P006"]
        expected = read_outs(paired, conditions, with_cells=False)
        for name, value in read_outs(loaded, conditions, with_cells=False).items():
            np.testing.assert_array_equal(value, expected[name], err_msg=name)
        assert np.isfinite(loaded.get_iwelbo(n_particles=2))

    def test_no_adata(self, paired, tmp_path):
        paired.save(str(tmp_path / "model"))
        loaded = SAMSVAE.load(str(tmp_path / "model"), adata=False, accelerator="cpu")
        np.testing.assert_array_equal(interactions_of(loaded), interactions_of(paired))


@pytest.mark.slow
class TestRecovery:
    """Of ten measured pairs, those that interact are called, and no other."""

    SCREEN = {
        "n_cells": 4_000,
        "n_perturbations": 10,
        "n_pairs": 10,
        "pair_fraction": 0.5,
    }

    @pytest.mark.parametrize("interaction_fraction", [0.4, 0.0])
    def test_pairs(self, interaction_fraction):
        adata = recovery_screen(interaction_fraction=interaction_fraction, **self.SCREEN)
        model = fit_recovery("SAMSVAE", adata, n_latent=8, interactions=True)
        called = interactions_of(model, "inclusion_probability").gt(0.5).any(axis=1)
        assert len(called) == 10
        truth = adata.uns["truth"]
        planted = set()
        if interaction_fraction:
            moved = truth["interaction"].any(axis=1)
            planted = set(truth["pair_names"][moved])
            assert len(planted) == 4
        assert set(called.index[called]) == planted
        # The pairs do not cost the masks of the single perturbations.
        masks = mask_recovery(truth["mask"], model.get_perturbation_mask())
        assert masks.f1 > 0.9
