"""Layers with a second input, against scvi-tools' on both inputs joined; the encoder."""

from __future__ import annotations

import pytest
import torch
from scvi.nn import FCLayers

from scvi_sams.module.networks import Potential, PotentialEncoder, SideInputLayers

N_CELLS, N_INPUT, N_SIDE, N_OUT = 9, 5, 3, 4
COVARIATES = {"n_cat_list": [3, 1, 2], "n_cont": 2}
SETTINGS = {"n_hidden": 6, "dropout_rate": 0, "use_batch_norm": False, "use_layer_norm": True}


class TestSideInputLayers:
    @pytest.fixture
    def covariates(self) -> dict:
        categories = [torch.randint(0, n, (N_CELLS, 1)) for n in COVARIATES["n_cat_list"]]
        return {
            "categories": categories,
            "cont": torch.randn(N_CELLS, 2, dtype=torch.float64),
        }

    @pytest.mark.parametrize("inject_covariates", [False, True])
    @pytest.mark.parametrize("n_layers", [1, 2])
    @pytest.mark.parametrize("leading", [(), (5,)], ids=["one", "draws"])
    @pytest.mark.parametrize("with_covariates", [False, True])
    def test_values_and_gradients(
        self, leading, n_layers, with_covariates, inject_covariates, covariates
    ):
        if with_covariates:
            sizes, categories, cont = COVARIATES, covariates["categories"], covariates["cont"]
        else:
            sizes, categories, cont = {}, [], None
        settings = {
            **SETTINGS,
            **sizes,
            "n_layers": n_layers,
            "inject_covariates": inject_covariates,
        }
        plain = FCLayers(N_INPUT + N_SIDE, N_OUT, **settings).double()
        layers = SideInputLayers(N_INPUT + N_SIDE, N_OUT, **settings).double()
        layers.load_state_dict(plain.state_dict())
        x = torch.randn(N_CELLS, N_INPUT, dtype=torch.float64)
        side_input = torch.randn(
            *leading, N_CELLS, N_SIDE, dtype=torch.float64, requires_grad=True
        )
        weight = torch.randn(*leading, N_CELLS, N_OUT, dtype=torch.float64)

        joined = torch.cat([x.expand(*leading, -1, -1), side_input], -1)
        results = []
        for values, network in (
            (plain(joined, *categories, cont=cont), plain),
            (layers(x, *categories, cont=cont, side_input=side_input), layers),
        ):
            inputs = [side_input, *network.parameters()]
            results.append([values, *torch.autograd.grad((weight * values).sum(), inputs)])
        for expected, found in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

    def test_without_side_input_they_are_those_of_scvi_tools(self, covariates):
        settings = {**SETTINGS, **COVARIATES}
        plain = FCLayers(N_INPUT, N_OUT, **settings).double()
        layers = SideInputLayers(N_INPUT, N_OUT, **settings).double()
        layers.load_state_dict(plain.state_dict())
        x = torch.randn(N_CELLS, N_INPUT, dtype=torch.float64)
        arguments = covariates["categories"], covariates["cont"]
        expected = plain(x, *arguments[0], cont=arguments[1])
        assert torch.equal(layers(x, *arguments[0], cont=arguments[1]), expected)

    def test_missing_covariates_are_an_error(self):
        layers = SideInputLayers(N_INPUT + N_SIDE, N_OUT, **SETTINGS, **COVARIATES)
        with pytest.raises(ValueError, match="covariate 0 are missing"):
            layers(torch.ones(N_CELLS, N_INPUT), side_input=torch.ones(N_CELLS, N_SIDE))


class TestEncoder:
    @pytest.mark.parametrize("basal_posterior", ["correlated", "residual"])
    def test_gain_and_variance(self, basal_posterior):
        encoder = PotentialEncoder(7, 3, basal_posterior=basal_posterior, n_hidden=16)
        potential = encoder.eval()(1_000 * (torch.poisson(8 * torch.rand(24, 7)) + 1))
        assert isinstance(potential, Potential)
        assert (potential.variance > 0).all()
        assert (potential.variance < 1).all()
        assert (potential.location.abs() <= 10).all()
        gain = torch.ones(()) if basal_posterior == "residual" else 1 - potential.variance
        assert torch.equal(potential.gain, gain.expand_as(potential.gain))
