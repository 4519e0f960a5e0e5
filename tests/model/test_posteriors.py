"""Every posterior of states and embeddings, under either engine."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from scvi_sams import CPAVAE, SAMSVAE

from ._members import fit_member, read_outs, tiny_screen
from ._simulations import fit_recovery, recovery_screen
from .conftest import SETUP

BASAL = ["mean_field", "correlated", "residual", "amortized"]
EMBEDDING = ["mean_field", "correlated", "spike_and_slab"]
CLOSED_FORM = [("correlated", "spike_and_slab"), ("residual", "spike_and_slab")]
ALL = [("gradient", *pair) for pair in product(BASAL, EMBEDDING)] + [
    ("closed_form", *pair) for pair in CLOSED_FORM
]
CONDITIONS = ["P001", "P001+P006"]


def _arguments(engine, basal, embedding):
    return {
        "global_inference": engine,
        "basal_posterior": basal,
        "embedding_posterior": embedding,
    }


@pytest.mark.parametrize(("engine", "basal", "embedding"), ALL)
@pytest.mark.parametrize("member", ["SAMSVAE", "CPAVAE"])
class TestTraining:
    def test_trains(self, member, engine, basal, embedding):
        model = fit_member(member, **_arguments(engine, basal, embedding))
        loss = model.history["reconstruction_loss_train"].to_numpy(dtype=float).ravel()
        assert loss[-1] < loss[0]
        assert np.abs(model.get_perturbation_effect()).max(axis=None) > 0
        for name, value in read_outs(model, CONDITIONS).items():
            assert np.isfinite(value).all(), name
        # The moments that are reported are those of the draws that predictions are made of.
        effects = model.module.effects
        draws = effects.sample(4_000)
        error = draws.std(0) / 4_000**0.5
        assert ((draws.mean(0) - effects.moments()[0]).abs() < 6 * error + 0.02).all()

    def test_same_seed_same_bits(self, member, engine, basal, embedding):
        arguments = _arguments(engine, basal, embedding) | {"max_epochs": 2}
        first, again = (fit_member(member, **arguments).module.state_dict() for _ in range(2))
        for name, value in first.items():
            np.testing.assert_array_equal(again[name], value, err_msg=name)


class TestEngine:
    @pytest.mark.parametrize("model_class", [SAMSVAE, CPAVAE])
    @pytest.mark.parametrize(("basal", "embedding"), list(product(BASAL, EMBEDDING)))
    def test_choice(self, model_class, basal, embedding):
        adata = tiny_screen()
        model_class.setup_anndata(adata, **SETUP)
        arguments = _arguments(None, basal, embedding)
        has_closed_form = (basal, embedding) in CLOSED_FORM
        assert (model_class(adata, **arguments).module.closed_form is not None) == has_closed_form
        arguments["global_inference"] = "closed_form"
        if has_closed_form:
            assert model_class(adata, **arguments).module.closed_form is not None
        else:
            message = rf"{basal}.*{embedding}.*use basal_posterior='correlated'.*'gradient'"
            with pytest.raises(ValueError, match=message):
                model_class(adata, **arguments)

    @pytest.mark.parametrize(
        ("argument", "value"),
        [("basal_posterior", "correlate"), ("embedding_posterior", "slab")],
    )
    def test_unknown(self, argument, value):
        adata = tiny_screen()
        SAMSVAE.setup_anndata(adata, **SETUP)
        with pytest.raises(ValueError, match=rf"{argument}='{value}'"):
            SAMSVAE(adata, **{argument: value})

    @pytest.mark.parametrize("argument", ["global_inference", "dose_response"])
    def test_unknown_setting(self, argument):
        adata = tiny_screen()
        SAMSVAE.setup_anndata(adata, **SETUP)
        with pytest.raises(ValueError, match=rf"{argument}='exact'"):
            SAMSVAE(adata, **{argument: "exact"})


class TestParticles:
    @pytest.mark.parametrize(
        ("engine", "basal", "embedding"),
        [
            ("gradient", "amortized", "correlated"),
            ("gradient", "mean_field", "mean_field"),
            ("gradient", "residual", "spike_and_slab"),
            ("closed_form", "correlated", "spike_and_slab"),
        ],
    )
    def test_trains(self, engine, basal, embedding):
        arguments = _arguments(engine, basal, embedding)
        states = [
            fit_member(
                "SAMSVAE", train={"plan_kwargs": {"n_particles": n_particles}}, **arguments
            ).module.state_dict()
            for n_particles in (1, 3, 3)
        ]
        weight = "decoder.logits.weight"
        assert not np.array_equal(states[0][weight], states[1][weight])
        np.testing.assert_array_equal(states[1][weight], states[2][weight])

    def test_gradient_is_less_noisy(self):
        """Sixteen particles have a fraction of the variance of one, about the same mean."""
        model = fit_member("SAMSVAE", basal_posterior="amortized", max_epochs=2)
        module = model.module
        (tensors,) = model._make_data_loader(model.adata, indices=range(60), batch_size=60)
        module.train()
        module.encoder.hidden.eval()  # without dropout

        def losses(n_samples):
            return [
                module(tensors, inference_kwargs={"n_samples": n_samples})[-1].loss.item()
                for _ in range(60)
            ]

        one, many = losses(1), losses(16)
        assert np.std(many) < 0.5 * np.std(one)
        error = np.hypot(np.std(one), np.std(many)) / 60**0.5
        assert abs(np.mean(one) - np.mean(many)) < 4 * error


@pytest.mark.slow
@pytest.mark.parametrize("better", ["correlated", "amortized"])
def test_a_guide_that_sees_the_shift_is_better(better):
    """Strong effects in shallow cells: counts alone do not tell basal state from shift."""
    adata = recovery_screen(
        n_cells=2_500,
        n_perturbations=10,
        n_latent=4,
        mask_probability=0.5,
        library_size=150.0,
        effect_size=3.0,
    )
    cells = np.arange(adata.n_obs)
    seen, held_out = cells[:1_500], cells[1_500:]
    bounds = {}
    for posterior in ("mean_field", better):
        model = fit_recovery(
            "SAMSVAE",
            adata,
            n_latent=6,
            max_epochs=50,
            mask_prior=0.5,
            basal_posterior=posterior,
            global_inference="gradient",
            train={"datasplitter_kwargs": {"external_indexing": [seen, held_out]}},
        )
        bounds[posterior] = model.get_iwelbo(indices=held_out, n_particles=50, return_mean=False)
    gain = bounds[better] - bounds["mean_field"]
    error = gain.std() / len(gain) ** 0.5
    assert gain.mean() > 0.5 + 3 * error  # about a nat a cell
