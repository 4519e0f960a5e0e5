"""The prior of effects against brute force, and what is predicted against simulated truth."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.stats import multivariate_normal

from scvi_sams import ScreenError
from scvi_sams.tl import predict_unseen
from scvi_sams.tl.effect_prior import EffectPrior, Noise, similarities, variance_ratios

N_MEASURED, N_NEW, N_GENES = 12, 4, 3


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(N_MEASURED + N_NEW, 3))
    noise = Noise(rng.uniform(0.5, 1.5, N_MEASURED), rng.uniform(0.1, 0.4, N_GENES))
    effect = rng.normal(size=(N_MEASURED, N_GENES)) + features[:N_MEASURED, :1]
    return effect, noise, features


def brute_force(effect, noise, similarity, share, ratio, gene):
    """Mean and variance of new effects of a gene at one ratio, and its restricted likelihood."""
    of_gene = noise.of_gene[gene]
    y, ones = effect[:, gene], np.ones(len(effect))
    scale = ratio * of_gene
    covariance = scale * (share * similarity.among + (1 - share) * np.eye(len(y)))
    covariance += of_gene * np.diag(noise.of_perturbation)
    # A mean of very wide prior in place of a flat one.
    wide = 1e3
    whole = covariance + wide
    cross = scale * share * similarity.to_measured + wide
    inverse = np.linalg.inv(whole)
    mean = cross @ inverse @ y
    own = scale * (share * similarity.own + 1 - share) + wide
    variance = own - np.einsum("np,pq,nq->n", cross, inverse, cross)
    likelihood = multivariate_normal(0 * ones, whole).logpdf(y) + 0.5 * np.log(2 * np.pi * wide)
    return mean, variance, likelihood


@pytest.mark.parametrize("kernel", range(5))
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_predictions_are_those_of_the_joint_normal_distribution(problem, kernel, share):
    effect, noise, features = problem
    similarity = list(similarities(features, N_MEASURED))[kernel]
    prior = EffectPrior(effect, noise, similarity, share, np.array([2.0]))
    found = prior.predict()
    for gene in range(N_GENES):
        mean, variance, _ = brute_force(effect, noise, similarity, share, 2.0, gene)
        np.testing.assert_allclose(found.mean[:, gene], mean, atol=1e-3)
        np.testing.assert_allclose(found.variance[:, gene], variance, rtol=1e-3)


def test_evidence_is_the_restricted_likelihood_with_the_best_weights_of_ratios(problem):
    effect, noise, features = problem
    ratios = np.array([0.0, 1.0, 10.0])
    evidence, reference = [], []
    for similarity in similarities(features, N_MEASURED):
        prior = EffectPrior(effect, noise, similarity, 0.7, ratios)
        likelihood = np.array(
            [
                [brute_force(effect, noise, similarity, 0.7, r, g)[2] for g in range(N_GENES)]
                for r in ratios
            ]
        )
        weights = np.exp(prior.log_weights).mean(1)
        np.testing.assert_allclose(np.exp(prior.log_weights).sum(0), 1)
        mixed = np.log(weights @ np.exp(likelihood)).sum()
        # No other weights of the ratios are likelier.
        others = np.random.default_rng(1).dirichlet(np.ones(3), 2_000)
        assert np.log(others @ np.exp(likelihood)).sum(1).max() <= mixed + 1e-2
        evidence.append(prior.log_evidence)
        reference.append(mixed)
    np.testing.assert_allclose(np.diff(evidence), np.diff(reference), atol=1e-2)


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_leave_one_out_is_a_fit_without_the_perturbation(problem, share):
    effect, noise, features = problem
    (similarity, *_) = similarities(features, N_MEASURED)
    ratios = np.array([0.5, 5.0])
    prior = EffectPrior(effect, noise, similarity, share, ratios)
    found = prior.leave_one_out()
    # Prior weights of the ratios, which are those of all perturbations.
    shared = np.exp(prior.log_weights).mean(1)
    for left in range(N_MEASURED):
        rest = np.arange(N_MEASURED) != left
        without = similarity._replace(
            among=similarity.among[np.ix_(rest, rest)],
            to_measured=similarity.among[[left]][:, rest],
            own=similarity.among[[left], left],
        )
        parts = Noise(noise.of_perturbation[rest], noise.of_gene)
        for gene in range(N_GENES):
            means, variances, likelihood = (
                np.ravel(column)
                for column in zip(
                    *(brute_force(effect[rest], parts, without, share, r, gene) for r in ratios),
                    strict=True,
                )
            )
            weights = shared * np.exp(likelihood - likelihood.max())
            weights /= weights.sum()
            mean = weights @ means
            variance = weights @ (variances + means**2) - mean**2
            # The weights of EM are at rest to a thousandth of a nat.
            np.testing.assert_allclose(found.mean[left, gene], mean, atol=5e-3)
            np.testing.assert_allclose(found.variance[left, gene], variance, rtol=2e-2)


def test_leave_one_out_in_pieces_is_the_same(problem, monkeypatch):
    effect, noise, features = problem
    (similarity, *_) = similarities(features, N_MEASURED)
    prior = EffectPrior(effect, noise, similarity, 0.5, variance_ratios(effect, noise))
    whole = prior.leave_one_out()
    monkeypatch.setattr("scvi_sams.tl.effect_prior._MAX_ELEMENTS", 1)
    for one, other in zip(whole, prior.leave_one_out(), strict=True):
        np.testing.assert_allclose(one, other)


def test_noise_of_a_product_is_found():
    rng = np.random.default_rng(0)
    rows, columns = rng.uniform(1, 3, 7), rng.uniform(1, 3, 5)
    noise = Noise.from_variances(np.outer(rows, columns))
    np.testing.assert_allclose(np.outer(*noise), np.outer(rows, columns))


def test_kernels():
    features = np.array([[1.0, 0], [-1, 0], [0, 2], [0, -2], [0, 0], [5, 0]])
    product, cosine, *near = similarities(features, 4)
    np.testing.assert_allclose(product.among, features[:4] @ features[:4].T / 2.5)
    np.testing.assert_allclose(product.own, [0, 10])
    np.testing.assert_allclose(cosine.to_measured, [[0, 0, 0, 0], [1, -1, 0, 0]])
    np.testing.assert_allclose(cosine.own, 1)
    for kernel in (product, cosine, *near):
        assert np.linalg.eigvalsh(kernel.among).min() > -1e-12


def screen(seed, informative, n_measured=40, n_new=30, n_genes=150, n_factors=5):
    """Effects of a linear truth in few factors, as measured, and an embedding of all."""
    rng = np.random.default_rng(seed)
    n = n_measured + n_new
    factors, loadings = rng.normal(size=(n, n_factors)), rng.normal(size=(n_factors, n_genes))
    own = 0.5 * rng.normal(size=(n, n_genes))
    truth = 0.3 + factors @ loadings / n_factors**0.5 + own
    error = np.outer(rng.uniform(0.1, 0.5, n), rng.uniform(0.5, 1.5, n_genes))
    names = [f"P{k}" for k in range(n)]
    features = factors @ rng.normal(size=(n_factors, 20)) if informative else np.zeros((n, 20))
    features = features + rng.normal(size=features.shape)
    measured = ad.AnnData(
        (truth + error * rng.normal(size=truth.shape))[:n_measured],
        obs=pd.DataFrame(index=names[:n_measured]),
        layers={"standard_error": error[:n_measured]},
    )
    return measured, pd.DataFrame(features, index=names), truth[n_measured:]


def test_informative_embeddings_beat_the_mean_and_intervals_hold_the_truth():
    errors, inside = [], []
    for seed in range(4):
        measured, embedding, truth = screen(seed, informative=True)
        found = predict_unseen(measured, embedding)
        assert found.obs["supported"].all()
        assert found.obs_names.tolist() == embedding.index[40:].tolist()
        mean = measured.X.mean(0)
        errors.append(((found.X - truth) ** 2).mean() / ((mean - truth) ** 2).mean())
        inside.append(
            [
                (np.abs(found.X - truth) <= width * found.layers["std"]).mean()
                for width in (0.6745, 1.2816, 1.96)
            ]
        )
        held = (found.layers["lower"] <= truth) & (truth <= found.layers["upper"])
        assert held.mean() == pytest.approx(0.95, abs=0.04)
        said = found.uns["scvi_sams"]
        assert said["error"] < said["mean_error"]
        assert said["verdict"].startswith("Supported")
    # What is left are the effects of each perturbation's own, and the noise of the embedding.
    assert np.mean(errors) < 0.6
    np.testing.assert_allclose(np.mean(inside, axis=0), [0.5, 0.8, 0.95], atol=0.05)


def test_useless_embeddings_are_refused_and_the_mean_keeps_its_interval():
    supported, inside = [], []
    for seed in range(20):
        measured, embedding, truth = screen(seed, informative=False, n_genes=50)
        found = predict_unseen(measured, embedding, credible_level=0.8)
        supported.append(found.obs["supported"].any())
        if supported[-1]:
            continue
        inside.append(((found.layers["lower"] <= truth) & (truth <= found.layers["upper"])).mean())
        assert found.uns["scvi_sams"]["verdict"].startswith("Not supported")
        # One mean for all of them, near that of the measured.
        np.testing.assert_allclose(found.X - found.X[:1], 0, atol=1e-5)
        assert np.abs(found.X[0] - measured.X.mean(0)).mean() < 0.15
    assert np.sum(supported) <= 2
    assert np.mean(inside) == pytest.approx(0.8, abs=0.04)


def test_what_is_like_none_is_the_mean_with_the_widest_interval():
    measured, embedding, _ = screen(0, informative=True)
    far = pd.DataFrame([embedding.iloc[:40].mean()], index=["far"])
    found = predict_unseen(measured, pd.concat([embedding, far]))
    if found.uns["scvi_sams"]["kernel"] != "scalar product":  # where length is of no account
        assert found["far"].layers["std"].mean() >= found.layers["std"].mean()
    np.testing.assert_allclose(found["far"].X[0], measured.X.mean(0), atol=0.3)


def test_names_and_order():
    measured, embedding, _ = screen(0, informative=True)
    found = predict_unseen(measured, embedding.iloc[::-1], ["P50", "P45"])
    assert found.obs_names.tolist() == ["P50", "P45"]
    again = predict_unseen(measured[::-1].copy(), embedding, ["P45", "P50"])
    np.testing.assert_allclose(found["P45"].X, again["P45"].X, rtol=1e-4, atol=1e-5)
    centred = embedding - embedding.iloc[:40].mean()
    unit = centred.div(np.linalg.norm(centred, axis=1), axis=0)
    cosine = unit.iloc[:40] @ unit.loc["P50"]
    assert found.obs.loc["P50", "nearest"] == cosine.idxmax()
    assert found.obs.loc["P50", "similarity"] == pytest.approx(cosine.max())


def test_errors():
    measured, embedding, _ = screen(0, informative=True, n_genes=20)
    few = embedding.drop(index=embedding.index[:31])
    with pytest.raises(ScreenError, match="9 measured perturbations are in `embedding`"):
        predict_unseen(measured, few)
    with pytest.raises(ScreenError, match="no row of 'GATA1'"):
        predict_unseen(measured, embedding, ["GATA1"])
    with pytest.raises(ScreenError, match="'P3' were measured"):
        predict_unseen(measured, embedding, ["P3"])
    with pytest.raises(ScreenError, match="add rows of others"):
        predict_unseen(measured, embedding.iloc[:40])
    with pytest.raises(ScreenError, match="give a DataFrame"):
        predict_unseen(measured, embedding.to_numpy())
    with pytest.raises(ScreenError, match="'P0' twice"):
        predict_unseen(measured, pd.concat([embedding, embedding.iloc[:1]]))
    with pytest.raises(ScreenError, match="`embedding` of 'P1' is not finite"):
        predict_unseen(measured, embedding.drop(index="P1").reindex(embedding.index))
    with pytest.raises(ScreenError, match="the same for all measured"):
        predict_unseen(measured, embedding * 0)
    with pytest.raises(ScreenError, match="give a model, or an AnnData"):
        predict_unseen(measured.to_df(), embedding)
    without = measured.copy()
    del without.layers["standard_error"]
    with pytest.raises(ScreenError, match="how well effects are known"):
        predict_unseen(without, embedding)
    measured.layers["standard_error"][4] = np.nan
    with pytest.raises(ScreenError, match="`effects` of 'P4'"):
        predict_unseen(measured, embedding)
    measured.layers["standard_error"][:] = 0
    with pytest.raises(ScreenError, match="all zero"):
        predict_unseen(measured, embedding)
