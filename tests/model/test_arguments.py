"""Arguments are of the right kind and range, or are refused by name; cells are told in any way."""

from __future__ import annotations

import inspect

import numpy as np
import pandas as pd
import pytest

from scvi_sams import SAMSVAE, ScreenError, tl
from scvi_sams._arguments import ARGUMENTS, check_names, checked
from scvi_sams.data.loader import cells_of

from .conftest import QUIET, SETUP, SIZE

PUBLIC_METHODS = [
    name
    for name, method in vars(SAMSVAE).items()
    if name.startswith(("get_", "predict", "counterfactual", "posterior_"))
    and inspect.isfunction(method)
]


class TestTable:
    @pytest.mark.parametrize(
        ("name", "value", "expected"),
        [
            ("n_latent", np.int64(3), 3),
            ("max_epochs", 3.0, 3),
            ("max_epochs", None, None),
            ("dropout_rate", 0, 0.0),
            ("mask_prior", (1, 10), (1.0, 10.0)),
            ("mask_prior", 0.5, 0.5),
            ("spike_scale", "learned", "learned"),
            ("encode_covariates", np.True_, True),
            ("unheard_of", "anything", "anything"),
        ],
    )
    def test_taken(self, name, value, expected):
        found = checked(name, value)
        assert found == expected
        assert type(found) is type(expected)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("n_latent", 0),
            ("n_latent", True),
            ("n_latent", 2.5),
            ("n_latent", "3"),
            ("n_latent", None),
            ("dropout_rate", 1.0),
            ("dropout_rate", np.nan),
            ("dropout_rate", -0.1),
            ("encode_covariates", 1),
            ("mask_prior", 0),
            ("mask_prior", (0, 1)),
            ("mask_prior", "low"),
            ("mask_evidence_cells", -1),
            ("spike_scale", "unlearned"),
            ("gene_likelihood", "negative"),
            ("gene_likelihood", ["nb"]),
            ("global_update_every", 0),
            ("credible_level", 1),
            ("max_epochs", 0),
            ("max_epochs", np.inf),
            ("lr", np.inf),
            ("n_samples", "3"),
        ],
    )
    def test_refused(self, name, value):
        with pytest.raises(ScreenError, match=f"^{name}=.*give .+\\."):
            checked(name, value)

    def test_defaults_are_in_range(self):
        from scvi_sams.train import SAMSTrainingPlan

        for function in (SAMSVAE.__init__, SAMSVAE.train, SAMSTrainingPlan.__init__):
            for name, parameter in inspect.signature(function).parameters.items():
                if name in ARGUMENTS:
                    checked(name, parameter.default)

    def test_nearest_name(self):
        with pytest.raises(ScreenError, match="plan_kwargs has no 'epz'. The nearest is 'eps'"):
            check_names(["epz"], ["eps", "lr"], "plan_kwargs")


class TestUsed:
    def test_constructor(self, fitted):
        for kwargs in ({"n_latent": 0}, {"dropout_rate": np.nan}, {"mask_evidence_cells": -1}):
            with pytest.raises(ScreenError, match=next(iter(kwargs))):
                SAMSVAE(fitted.adata, **(SIZE | kwargs))

    def test_train(self, screen):
        SAMSVAE.setup_anndata(screen, **SETUP)
        model = SAMSVAE(screen, **SIZE)
        for kwargs, message in (
            ({"max_epochs": 0}, "max_epochs=0"),
            ({"lr": 0.1}, r"plan_kwargs=\{'lr': 0.1\}"),
            ({"max_epoch": 3}, "nearest is 'max_epochs'"),
            ({"plan_kwargs": {"learning_rate": 1.0}}, "nearest is 'lr'"),
            ({"plan_kwargs": {"global_update_every": 0}}, "global_update_every=0"),
            ({"plan_kwargs": {"lr": -1.0}}, "lr=-1"),
            ({"datasplitter_kwargs": {"chunksize": 1}}, "nearest is 'chunk_size'"),
            ({"batch_size": "64"}, "batch_size='64'"),
        ):
            with pytest.raises(ScreenError, match=message):
                model.train(**kwargs)
        assert not model.is_trained
        model.train(max_epochs=np.int64(1), batch_size=64.0, **QUIET)

    @pytest.mark.parametrize(
        "call",
        [
            lambda m: m.get_elbo(n_samples="3"),
            lambda m: m.get_elbo(n_samples=0),
            lambda m: m.get_normalized_expression(n_samples=0),
            lambda m: m.posterior_predictive_sample(n_samples=-1),
            lambda m: m.predict(["P001"], n_samples=0),
            lambda m: m.predict(["P001"], library_size=-1),
            lambda m: m.predict(["P001"], library_size="latent"),
            lambda m: m.get_average_treatment_effect(["P001"], n_samples=1.5),
            lambda m: m.get_average_treatment_effect(["P001"], credible_level="high"),
            lambda m: m.get_latent_representation(batch_size=0),
        ],
    )
    def test_methods(self, fitted, call):
        with pytest.raises(ScreenError, match="cannot be used|is no number"):
            call(fitted)

    NEEDED = {
        "conditions": ["P001"],
        "perturbation_key": "perturbation",
        "control": "control",
        "pairs": ["P001+P002"],
    }

    ANALYSES = sorted(set(tl.__all__) - {"classify_pairs", "predict_unseen"})  # of tables

    @pytest.mark.parametrize("name", [*ANALYSES, *PUBLIC_METHODS])
    def test_every_analysis(self, fitted, name):
        """Whatever has an argument of the table refuses nonsense by its name, before it works."""
        call = getattr(tl, name, None) or getattr(fitted, name)
        parameters = inspect.signature(call).parameters
        needed = self.NEEDED | {"model": fitted, "adata": fitted.adata}
        needed["target"] = {"up": list(fitted.adata.var_names[:2])}
        asked = {key: needed[key] for key in needed.keys() & parameters.keys()}
        for argument in ARGUMENTS.keys() & parameters.keys() - self.NEEDED.keys():
            if argument in inspect.signature(SAMSVAE.setup_anndata).parameters:
                continue  # refused as what the AnnData does not have
            try:
                call(**asked | {argument: object()})
            except NotImplementedError:
                continue  # of models of another kind
            except ScreenError as error:
                assert argument in str(error)  # noqa: PT017
            else:
                pytest.fail(f"{argument} was taken")

    def test_setup(self, screen):
        for name, value in (
            ("batch_key", ["replicate"]),
            ("context_key", ["replicate"]),
            ("guide_key", 1),
            ("guide_threshold", "5"),
            ("is_count_data", "yes"),
        ):
            with pytest.raises(ScreenError, match=f"^{name}=.* cannot be used: give "):
                SAMSVAE.setup_anndata(screen, **(SETUP | {name: value}))
        with pytest.raises(ScreenError, match="setup_anndata has no 'batch_ky'.*'batch_key'"):
            SAMSVAE.setup_anndata(screen, **SETUP, batch_ky="replicate")
        with pytest.raises(ScreenError, match="context_key='perturbation' is the column of the p"):
            SAMSVAE.setup_anndata(screen, **SETUP, context_key="perturbation")

    def test_one_key(self, screen):
        screen.obs["pct"] = 1.0 * np.arange(screen.n_obs)
        SAMSVAE.setup_anndata(
            screen,
            **SETUP,
            continuous_covariate_keys="pct",
            categorical_covariate_keys="replicate",
        )
        stats = SAMSVAE(screen, **SIZE).summary_stats
        assert (stats.n_extra_continuous_covs, stats.n_extra_categorical_covs) == (1, 1)


class TestStopping:
    def test_stops(self, screen):
        """Where the bound cannot improve, training ends before the last epoch."""
        SAMSVAE.setup_anndata(screen, **SETUP)
        model = SAMSVAE(screen, **SIZE)
        model.train(max_epochs=30, early_stopping=True, early_stopping_min_delta=1e9, **QUIET)
        assert 24 < len(model.history["elbo_validation"]) < 30

    @pytest.mark.parametrize("every", [1, 3])
    def test_can_stop_whatever_the_schedule(self, screen, every):
        SAMSVAE.setup_anndata(screen, **SETUP)
        model = SAMSVAE(screen, **SIZE)
        model.train(
            max_epochs=45,
            early_stopping=True,
            early_stopping_min_delta=1e9,
            check_val_every_n_epoch=every,
            **QUIET,
        )
        assert len(model.history["elbo_train"]) < 45

    def test_plateau(self, screen):
        SAMSVAE.setup_anndata(screen, **SETUP)
        model = SAMSVAE(screen, **SIZE)
        model.train(
            max_epochs=20,
            plan_kwargs={"reduce_lr_on_plateau": True, "lr_threshold": 1e9},
            check_val_every_n_epoch=1,
            **QUIET,
        )
        (rates,) = model.trainer.optimizers
        assert rates.param_groups[0]["lr"] < 4e-3


class TestCells:
    NAMES = ("cell_004", "cell_002")

    @pytest.mark.parametrize(
        ("indices", "expected"),
        [
            (None, range(600)),
            (slice(2, 5), [2, 3, 4]),
            ([3, 1], [3, 1]),
            ([-1], [599]),
            (np.array([3.0, 1.0]), [3, 1]),
            (5, [5]),
            (list(NAMES), [3, 1]),
            (pd.Index(NAMES), [3, 1]),
            (np.array(NAMES, dtype=object), [3, 1]),
            ("cell_002", [1]),
            (np.arange(600) < 2, [0, 1]),
            (pd.Series(np.arange(600) < 2, dtype="boolean"), [0, 1]),
            ((np.arange(600) < 2).astype(object), [0, 1]),
        ],
    )
    def test_read(self, screen, indices, expected):
        assert cells_of(screen, indices).tolist() == list(expected)

    @pytest.mark.parametrize(
        ("indices", "message"),
        [
            ([True] * 390, "mask of 390 cells, and there are 600"),
            ([], "no cell"),
            ([False] * 600, "no cell"),
            (slice(0, 0), "no cell"),
            ([600], "out of range: '600'"),
            ([-601], "out of range"),
            ([0.5], "positions, names"),
            ([np.nan], "positions, names"),
            (["nobody"], "'nobody'"),
            ([[1, 2]], "one position a cell"),
        ],
    )
    def test_refused(self, fitted, indices, message):
        for method in (
            fitted.get_latent_representation,
            fitted.get_elbo,
            fitted.get_normalized_expression,
            fitted.posterior_predictive_sample,
        ):
            with pytest.raises(ScreenError, match=message):
                method(indices=indices)
        with pytest.raises(ScreenError, match=message):
            fitted.predict(["P001"], basal=indices)

    def test_names_label_tables(self, fitted):
        table = fitted.get_normalized_expression(indices=list(self.NAMES))
        assert table.index.tolist() == list(self.NAMES)
