"""The mixture of cells that escaped and cells in which it took, against truth and integration."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, stats

from scvi_sams.module.doses import Doses
from scvi_sams.module.efficacy import (
    Cells,
    Entries,
    Fold,
    Prior,
    Projection,
    disagreement,
    efficacies,
    fit_mixture,
    fold_log_ratio,
    learned_fold,
    log_ratio,
    multiples_where_it_took,
    project,
    solve,
    without_others,
)
from scvi_sams.module.networks import Potential


def _simulate(efficacy, n_cells=200, size=2.0, spread=0.0, fold=None, seed=0):
    """Cells of two guides each of several perturbations, whose effects were fitted diluted."""
    rng = np.random.default_rng(seed)
    rows = []
    for perturbation, of_guides in enumerate(efficacy):
        dilution = np.mean(of_guides)
        for number, rho in enumerate(of_guides):
            took = rng.random(n_cells) < rho
            information = np.full(n_cells, 0.7 * (size * dilution) ** 2)
            multiple = took / dilution * (1 + spread * rng.standard_normal(n_cells))
            noise = np.sqrt(information) * rng.standard_normal(n_cells)
            mean = np.full(n_cells, 0.0 if fold is None else 2.0)
            counts = rng.poisson(mean * np.where(took, np.exp(fold or 0.0), 1.0))
            guide = np.full(n_cells, len(of_guides) * perturbation + number)
            score = information * multiple + noise
            rows.append((score, information, np.full(n_cells, perturbation), guide, counts, mean))
            rows[-1] = (*rows[-1], took)
    score, information, perturbation, guide, counts, mean, took = map(
        np.concatenate, zip(*rows, strict=True)
    )

    def column(values, dtype=torch.float32):
        return torch.as_tensor(values, dtype=dtype)[:, None]

    cells = Cells(
        Projection(column(score), column(information)[:, :, None]),
        column(perturbation, torch.long),
        column(guide, torch.long),
        torch.ones(len(score), 1),
        column(counts),
        column(mean),
        torch.zeros(len(score), 1),
    )
    target = torch.arange(len(efficacy)).repeat_interleave(len(efficacy[0]))
    return cells, target, took


def test_log_ratio_is_that_of_an_integral_over_multiples():
    score, information, multiple, spread = 2.3, 3.1, 1.4, 0.4

    def joint(m):
        return stats.norm.pdf(m, multiple, multiple * spread) * np.exp(
            score * m - information * m**2 / 2
        )

    expected = np.log(integrate.quad(joint, -10, 10, points=[multiple])[0])
    found = log_ratio(torch.tensor(score), torch.tensor(information), multiple, spread)
    assert found.item() == pytest.approx(expected, abs=1e-5)


def test_fold_log_ratio_is_that_of_negative_binomials():
    counts = np.arange(6)
    mean, dispersion, log_fold, excess = 2.0, 0.3, -0.8, 0.5

    def log_pmf(mu, alpha):
        return stats.nbinom.logpmf(counts, 1 / alpha, 1 / (1 + mu * alpha))

    expected = log_pmf(mean * np.exp(log_fold), dispersion + excess) - log_pmf(mean, dispersion)
    found = fold_log_ratio(
        torch.tensor(counts, dtype=torch.float64),
        torch.tensor(mean, dtype=torch.float64),
        torch.tensor(dispersion, dtype=torch.float64),
        torch.tensor(log_fold, dtype=torch.float64),
        excess,
    )
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_projection_is_the_likelihood_of_multiples_of_effects():
    generator = torch.Generator().manual_seed(0)
    n_cells, n_latent = 5, 4
    effects = torch.randn(n_cells, 2, n_latent, generator=generator)
    location = torch.randn(n_cells, n_latent, generator=generator)
    gain = torch.rand(n_cells, n_latent, generator=generator)
    doses = Doses(torch.tensor([[0, 1]] * n_cells), torch.tensor([[1.0, 0.5]] * n_cells))
    projection = project(Potential(location, gain, 1 - gain), doses, effects)
    multiple = torch.rand(n_cells, 2, generator=generator)

    def log_likelihood(m):
        shift = (m.unsqueeze(-1) * doses.dose.unsqueeze(-1) * effects).sum(1)
        return -0.5 * (gain * (location - shift).square()).sum(1)

    quadratic = torch.einsum("cij,ci,cj->c", projection.information, multiple, multiple)
    expected = log_likelihood(multiple) - log_likelihood(torch.zeros_like(multiple))
    torch.testing.assert_close((projection.score * multiple).sum(1) - 0.5 * quadratic, expected)
    # Of one column, given the other.
    score, information = without_others(projection, multiple)
    without = multiple.clone()
    without[:, 0] = 0
    expected = log_likelihood(multiple) - log_likelihood(without)
    found = score[:, 0] * multiple[:, 0] - 0.5 * information[:, 0] * multiple[:, 0] ** 2
    torch.testing.assert_close(found, expected)


def test_a_guide_without_a_gain_is_refused():
    potential = Potential(torch.zeros(1, 2), None, torch.ones(1, 2))
    doses = Doses(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1))
    with pytest.raises(ValueError, match="gain"):
        project(potential, doses, torch.ones(1, 1, 2))


def test_mixture_is_that_of_brute_force():
    cells, target, _ = _simulate([[0.6]], n_cells=60, size=2.5)
    entries = Entries(
        cells.projection.score[:, 0],
        cells.projection.information[:, 0, 0],
        cells.guide[:, 0],
        torch.zeros(60),
    )
    prior = Prior(3.0, 1.0)
    found = fit_mixture(entries, target, torch.ones(1), torch.zeros(1), prior, all_took=False)
    rho = np.linspace(0, 1, 402)[1:-1]
    multiples = np.geomspace(0.7, 8, 1500)
    weight = np.zeros_like(rho)
    spreads = (0.0, 0.25, 0.5, 0.75, 1.0)
    for spread in spreads:
        ratio = log_ratio(
            entries.score[:, None].double(),
            entries.information[:, None].double(),
            torch.tensor(multiples)[None],
            spread,
        ).numpy()
        likelihood = np.log(1 - rho[:, None, None] + rho[:, None, None] * np.exp(ratio)[None])
        weight += np.exp(likelihood.sum(1)).sum(1)
    weight *= stats.beta.pdf(rho, prior.a, prior.b)
    evidence = np.log(weight.mean() / len(multiples) / len(spreads))
    mean = (weight * rho).sum() / weight.sum()
    centres = (found.edges[:, 1:] + found.edges[:, :-1]) / 2
    assert (found.mass * centres).sum().item() == pytest.approx(mean, abs=0.01)
    assert found.log_evidence.item() == pytest.approx(evidence, abs=0.15)


@pytest.mark.parametrize("fold", [None, -1.5])
def test_efficacies_and_effects_are_recovered(fold):
    truth = [[0.3, 0.9], [0.5, 0.7], [1.0, 1.0], [0.9, 1.0]]
    size = 3.0 if fold is None else 2.0
    cells, target, took = _simulate(truth, n_cells=300, size=size, fold=fold)
    solution = solve(cells, target, torch.zeros(4))
    known = efficacies(solution, target)
    realised = np.array([took[cells.guide[:, 0].numpy() == k].mean() for k in range(8)])
    np.testing.assert_allclose(known.mean.numpy(), realised, atol=0.09)
    assert known.can_be_told.all()
    lower, upper = known.lower.numpy(), known.upper.numpy()
    assert ((lower <= realised) & (realised <= upper + 0.01)).sum() >= 7
    multiples = multiples_where_it_took(solution, target).numpy()
    np.testing.assert_allclose(multiples, 1 / np.mean(truth, 1), rtol=0.1)
    # Calibrated on cells.
    r = solution.probability[:, 0].numpy()
    for low in (0.0, 0.25, 0.5, 0.75):
        group = (r >= low) & (r < low + 0.25)
        if group.sum() > 50:
            assert took[group].mean() == pytest.approx(r[group].mean(), abs=0.15)


def test_effects_that_are_too_weak_are_not_told():
    cells, target, _ = _simulate([[0.9, 0.4], [0.6, 1.0], [0.8, 0.8]], size=0.15)
    solution = solve(cells, target, torch.zeros(3))
    assert not efficacies(solution, target).can_be_told.any()
    np.testing.assert_array_equal(multiples_where_it_took(solution, target).numpy(), 1.0)


def test_graded_effects_do_not_pass_for_cells_that_escaped():
    cells, target, _ = _simulate([[1.0, 1.0]] * 6, size=3.0, spread=0.4, n_cells=300)
    solution = solve(cells, target, torch.zeros(6))
    assert efficacies(solution, target).mean.min() > 0.9
    assert multiples_where_it_took(solution, target).max() < 1.1


def test_perturbations_of_one_cell_are_told_apart():
    rng = np.random.default_rng(0)
    n_cells, effects = 600, torch.tensor([[2.5, 0.0, 0.5], [0.0, 2.5, 0.5]])
    truth = np.array([0.6, 0.9])
    took = rng.random((n_cells, 2)) < truth
    gain = torch.full((n_cells, 3), 0.7)
    shift = torch.as_tensor(took / truth, dtype=torch.float32) @ (
        effects * torch.tensor(truth, dtype=torch.float32)[:, None]
    )
    noise = torch.as_tensor(rng.standard_normal((n_cells, 3)), dtype=torch.float32)
    potential = Potential(shift + noise / gain.sqrt(), gain, 1 - gain)
    index = torch.tensor([[0, 1]] * n_cells)
    dose = torch.ones(n_cells, 2)
    fitted = effects * torch.tensor(truth, dtype=torch.float32)[:, None]
    nothing = torch.zeros(n_cells, 2)
    cells = Cells(
        project(potential, Doses(index, dose), fitted[index]),
        index, index, dose, nothing, nothing, nothing,
    )  # fmt: skip
    target = torch.arange(2)
    solution = solve(cells, target, torch.zeros(2))
    realised = took.mean(0)
    np.testing.assert_allclose(efficacies(solution, target).mean.numpy(), realised, atol=0.06)
    r = solution.probability.numpy()
    assert ((r > 0.5) == took).mean() > 0.85


def test_folds_are_where_their_likelihood_is_greatest():
    rng = np.random.default_rng(1)
    n = 4_000
    group = torch.as_tensor(np.repeat([0, 1], n))
    truth, excess = np.array([-1.0, 0.5]), 0.6
    mean = torch.full((2 * n,), 5.0)
    expected = 5.0 * np.exp(truth)[group.numpy()]
    counts = rng.poisson(expected * rng.gamma(1 / excess, excess, 2 * n))
    fold = Fold(torch.zeros(2), torch.zeros(2))
    ones = torch.ones(2 * n)
    counts = torch.as_tensor(counts, dtype=torch.float32)
    for _ in range(30):
        fold = learned_fold(counts, mean, torch.zeros(2 * n), ones, ones, group, fold)
    np.testing.assert_allclose(fold.log_fold.numpy(), truth, atol=0.06)
    np.testing.assert_allclose(fold.excess.numpy(), excess, atol=0.1)


def _guide_means(rng, n_cells, shifts, covariance):
    root = np.linalg.cholesky(covariance)
    noise = rng.standard_normal(shifts.shape) @ root.T
    return shifts + noise / np.sqrt(n_cells)[:, None]


def test_disagreement_is_the_distance_to_the_nearest_line():
    rng = np.random.default_rng(0)
    covariance = np.diag([1.0, 2.0, 0.5])
    mean, n_cells = rng.standard_normal((2, 3)), np.array([30.0, 50.0])
    p, _ = disagreement(mean, n_cells, covariance, np.zeros(2, int))

    def distance(angle):
        a, b = np.cos(angle), np.sin(angle)
        difference = b * mean[0] - a * mean[1]
        variance = covariance * (b**2 / n_cells[0] + a**2 / n_cells[1])
        return difference @ np.linalg.solve(variance, difference)

    least = min(
        optimize.minimize_scalar(distance, bounds=(low, low + 0.4), method="bounded").fun
        for low in np.arange(0, np.pi, 0.4)
    )
    np.testing.assert_allclose(p, stats.chi2.sf(least, 2), rtol=1e-4)


def test_guides_that_differ_in_efficacy_alone_agree_and_others_do_not():
    rng = np.random.default_rng(3)
    n_targets, dimensions = 300, 6
    base = rng.standard_normal((n_targets, dimensions))
    shifts = np.repeat(base, 2, axis=0) * np.tile([0.4, 1.0], n_targets)[:, None]
    n_cells = np.full(2 * n_targets, 200.0)
    target = np.repeat(np.arange(n_targets), 2)
    p, similarity = disagreement(
        _guide_means(rng, n_cells, shifts, np.eye(dimensions)), n_cells, np.eye(dimensions), target
    )
    assert stats.kstest(p[::2], "uniform").pvalue > 0.01
    assert np.median(similarity) > 0.9
    shifts[::2] += 0.5 * rng.standard_normal((n_targets, dimensions))
    p, _ = disagreement(
        _guide_means(rng, n_cells, shifts, np.eye(dimensions)), n_cells, np.eye(dimensions), target
    )
    assert np.mean(p < 0.01) > 0.8


def test_the_only_guide_of_a_target_is_not_tested():
    p, similarity = disagreement(np.ones((1, 2)), np.ones(1), np.eye(2), np.zeros(1, int))
    assert np.isnan(p).all()
    assert np.isnan(similarity).all()
