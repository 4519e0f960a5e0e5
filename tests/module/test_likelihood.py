"""Likelihoods and what they expect, against scipy, torch and sums over all counts."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from scvi.distributions import NegativeBinomial

from scvi_sams.module.likelihood import (
    expected_expression,
    expected_log_normalized,
    expected_log_normalized_expression,
    log_share,
    negative_binomial_log_likelihood,
    observation_distribution,
    observation_log_likelihood,
)
from scvi_sams.module.networks import Decoded

N_CELLS, N_GENES = 6, 5


@pytest.fixture
def cells() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, log inverse dispersion, counts (some zero, some large), library; float64."""
    logits = torch.randn(N_CELLS, N_GENES, dtype=torch.float64)
    log_theta = torch.linspace(-1.5, 3, N_GENES, dtype=torch.float64)
    counts = torch.poisson(torch.rand(N_CELLS, N_GENES, dtype=torch.float64) * 15)
    counts[0, 0], counts[1, 1] = 0, 900
    # Not the sum of the counts: a size factor over more genes than are modelled.
    library = counts.sum(1, keepdim=True) * 1.7
    return logits, log_theta, counts, library


def plain(logits, log_theta, counts, library):
    """The same likelihood as an expression that torch differentiates."""
    mean = library * torch.softmax(logits, -1)
    theta = log_theta.exp()
    total = counts + theta
    return (
        torch.lgamma(total)
        - torch.lgamma(theta)
        - torch.lgamma(counts + 1)
        + theta * (theta / (theta + mean)).log()
        + counts * (mean / (theta + mean)).log()
    ).sum(-1)


class TestCeiling:
    """Size factors that the shares of the genes need not add up to."""

    def test_value_and_gradients(self, cells):
        logits, log_theta, counts, library = cells
        ceiling = torch.tensor(0.8, dtype=torch.float64)
        rest = torch.zeros(N_CELLS, 1, dtype=torch.float64)

        def reference(logits, log_theta):
            share = torch.softmax(torch.cat([logits, rest], -1), -1)[:, :-1]
            px = NegativeBinomial(mu=ceiling * share * library, theta=log_theta.exp())
            return px.log_prob(counts).sum(-1)

        def ours(logits, log_theta):
            return negative_binomial_log_likelihood(
                logits, log_theta, counts, library, ceiling=ceiling
            )

        both = []
        for function in (reference, ours):
            inputs = [x.clone().requires_grad_() for x in (logits, log_theta)]
            value = function(*inputs)
            both.append([value, *torch.autograd.grad(value.sum(), inputs)])
        for expected, actual in zip(*both, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


class TestValue:
    def test_matches_scipy(self, cells):
        logits, log_theta, counts, library = cells
        mean = (library * torch.softmax(logits, -1)).numpy()
        theta = log_theta.exp().numpy()
        expected = scipy.stats.nbinom.logpmf(counts.numpy(), theta, theta / (theta + mean)).sum(1)
        actual = negative_binomial_log_likelihood(*cells)
        np.testing.assert_allclose(actual, expected, rtol=1e-10)

    def test_matches_scvi(self, cells):
        logits, log_theta, counts, library = cells
        px = NegativeBinomial(mu=library * torch.softmax(logits, -1), theta=log_theta.exp())
        torch.testing.assert_close(
            negative_binomial_log_likelihood(*cells),
            px.log_prob(counts).sum(-1),
            rtol=1e-6,
            atol=0,
        )

    def test_is_that_of_a_distribution(self):
        """Over one gene the mean is the library, and all probabilities add to one."""
        counts = torch.arange(2_000, dtype=torch.float64)[:, None]
        log_likelihood = negative_binomial_log_likelihood(
            torch.zeros(2_000, 1, dtype=torch.float64),
            torch.tensor([0.7], dtype=torch.float64),
            counts,
            torch.full((2_000, 1), 30.0, dtype=torch.float64),
        )
        probability = log_likelihood.exp()
        assert probability.sum().item() == pytest.approx(1, abs=1e-9)
        assert (probability * counts[:, 0]).sum().item() == pytest.approx(30, abs=1e-6)

    def test_leading_dimensions(self, cells):
        logits, *rest = cells
        several = torch.stack([logits, logits + torch.randn_like(logits), -logits])
        together = negative_binomial_log_likelihood(several, *rest)
        apart = torch.stack([negative_binomial_log_likelihood(one, *rest) for one in several])
        torch.testing.assert_close(together, apart)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_computed_in_single(self, cells, dtype):
        logits, *rest = (tensor.float() for tensor in cells)
        half = logits.to(dtype).requires_grad_()
        log_likelihood = negative_binomial_log_likelihood(half, *rest)
        assert log_likelihood.dtype == torch.float32
        exact = negative_binomial_log_likelihood(half.detach().float(), *rest)
        assert torch.equal(log_likelihood, exact)
        log_likelihood.sum().backward()
        assert half.grad.dtype == dtype


class TestGradient:
    def test_matches_finite_differences(self, cells):
        logits, log_theta, counts, library = cells
        assert torch.autograd.gradcheck(
            lambda logits, log_theta: negative_binomial_log_likelihood(
                logits, log_theta, counts, library
            ),
            (logits.requires_grad_(), log_theta.requires_grad_()),
        )

    @pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
    def test_matches_automatic_differentiation(self, cells, leading):
        logits, log_theta, counts, library = cells
        logits = torch.randn(*leading, N_CELLS, N_GENES, dtype=torch.float64)
        weight = torch.randn(*leading, N_CELLS, dtype=torch.float64)
        gradients = []
        for function in (negative_binomial_log_likelihood, plain):
            inputs = logits.clone().requires_grad_(), log_theta.clone().requires_grad_()
            value = (weight * function(*inputs, counts, library)).sum()
            gradients.append(torch.autograd.grad(value, inputs))
        for by_hand, automatic in zip(*gradients, strict=True):
            torch.testing.assert_close(by_hand, automatic)

    def test_only_what_is_asked_for(self, cells):
        logits, log_theta, counts, library = cells
        log_theta.requires_grad_()
        negative_binomial_log_likelihood(logits, log_theta, counts, library).sum().backward()
        assert log_theta.grad is not None
        assert logits.grad is None


class TestPositionsOfCounts:
    """Gamma functions are worked out only where counts are; torch works them out everywhere."""

    @pytest.mark.parametrize("per_cell", [False, True], ids=["gene", "cell"])
    @pytest.mark.parametrize("leading", [(), (3,)], ids=["one", "particles"])
    def test_value_and_gradients(self, cells, leading, per_cell):
        _, log_theta, counts, library = cells
        counts = counts * (torch.rand_like(counts) < 0.4)
        counts[2] = 0  # a cell may have none
        nonzero = counts.flatten().nonzero().squeeze(1)
        assert 0 < len(nonzero) < counts.numel()
        logits = torch.randn(*leading, N_CELLS, N_GENES, dtype=torch.float64)
        if per_cell:
            log_theta = torch.randn(N_CELLS, N_GENES, dtype=torch.float64)
        weight = torch.randn(*leading, N_CELLS, dtype=torch.float64)

        def reference(logits, log_theta):
            log_mean = torch.log_softmax(logits, -1) + library.log()
            px = torch.distributions.NegativeBinomial(
                log_theta.exp(), logits=log_mean - log_theta, validate_args=False
            )
            return px.log_prob(counts).sum(-1)

        def ours(logits, log_theta):
            return negative_binomial_log_likelihood(
                logits, log_theta, counts, library, nonzero=nonzero
            )

        both = []
        for function in (reference, ours):
            inputs = [x.clone().requires_grad_() for x in (logits, log_theta)]
            value = function(*inputs)
            both.append([value, *torch.autograd.grad((weight * value).sum(), inputs)])
        for expected, actual in zip(*both, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)

    def test_gradient_can_be_asked_for_twice(self, cells):
        """Nothing that the gradient needs is overwritten by it."""
        logits, log_theta, counts, library = cells
        inputs = logits.requires_grad_(), log_theta.requires_grad_()
        value = negative_binomial_log_likelihood(*inputs, counts, library).sum()
        first = torch.autograd.grad(value, inputs, retain_graph=True)
        second = torch.autograd.grad(value, inputs)
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


class TestDispersionFromFewCells:
    @staticmethod
    def gradient(cells, order, n_dispersion_cells):
        logits, log_theta, counts, library = cells
        logits = logits[order].clone().requires_grad_()
        log_theta = log_theta.clone().requires_grad_()
        negative_binomial_log_likelihood(
            logits, log_theta, counts[order], library[order], n_dispersion_cells
        ).sum().backward()
        return logits.grad, log_theta.grad

    @pytest.mark.parametrize("k", [1, 2, 3])
    def test_is_unbiased(self, cells, k):
        """Averaged over orders in which each cell is once in every place."""
        everything = torch.arange(N_CELLS)
        _, full = self.gradient(cells, everything, None)
        estimates = [
            self.gradient(cells, everything.roll(start), k)[1] for start in range(N_CELLS)
        ]
        torch.testing.assert_close(torch.stack(estimates).mean(0), full)
        assert not torch.allclose(estimates[0], full)

    def test_leaves_the_logits_alone(self, cells):
        everything = torch.arange(N_CELLS)
        full, _ = self.gradient(cells, everything, None)
        some, _ = self.gradient(cells, everything, 2)
        assert torch.equal(full, some)

    def test_more_than_there_are_is_all(self, cells):
        everything = torch.arange(N_CELLS)
        _, full = self.gradient(cells, everything, None)
        _, capped = self.gradient(cells, everything, 100)
        assert torch.equal(full, capped)


class TestDispersionOfEachCell:
    """One inverse dispersion for each cell and gene, as that of its batch."""

    @pytest.fixture
    def cells(self, cells):
        logits, _, counts, library = cells
        return logits, torch.randn(N_CELLS, N_GENES, dtype=torch.float64), counts, library

    def test_matches_scipy(self, cells):
        logits, log_theta, counts, library = cells
        mean = (library * torch.softmax(logits, -1)).numpy()
        theta = log_theta.exp().numpy()
        expected = scipy.stats.nbinom.logpmf(counts.numpy(), theta, theta / (theta + mean)).sum(1)
        np.testing.assert_allclose(negative_binomial_log_likelihood(*cells), expected, rtol=1e-10)

    def test_same_in_all_cells_is_that_of_the_gene(self, cells):
        logits, log_theta, counts, library = cells
        together = log_theta[0].clone().requires_grad_()
        apart = log_theta[:1].expand(N_CELLS, -1).clone().requires_grad_()
        values = [
            negative_binomial_log_likelihood(logits, dispersion, counts, library)
            for dispersion in (together, apart)
        ]
        torch.testing.assert_close(*values)
        for value in values:
            value.sum().backward()
        torch.testing.assert_close(apart.grad.sum(0), together.grad)

    @pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
    def test_matches_automatic_differentiation(self, cells, leading):
        _, log_theta, counts, library = cells
        logits = torch.randn(*leading, N_CELLS, N_GENES, dtype=torch.float64)
        weight = torch.randn(*leading, N_CELLS, dtype=torch.float64)
        gradients = []
        for function in (negative_binomial_log_likelihood, plain):
            inputs = logits.clone().requires_grad_(), log_theta.clone().requires_grad_()
            value = (weight * function(*inputs, counts, library)).sum()
            gradients.append(torch.autograd.grad(value, inputs))
        for by_hand, automatic in zip(*gradients, strict=True):
            torch.testing.assert_close(by_hand, automatic)

    @pytest.mark.parametrize("k", [1, 4])
    def test_few_cells_stand_for_all(self, cells, k):
        """The leading cells are scaled up, the others have no gradient, the mean is unbiased."""
        everything = torch.arange(N_CELLS)
        gradient = TestDispersionFromFewCells.gradient
        logits, log_theta, counts, library = cells

        def of_dispersion(order, n_dispersion_cells):
            in_order = logits, log_theta[order], counts, library
            found = torch.empty_like(log_theta)
            found[order] = gradient(in_order, order, n_dispersion_cells)[1]
            return found

        full = of_dispersion(everything, None)
        some = of_dispersion(everything, k)
        torch.testing.assert_close(some[:k], full[:k] * N_CELLS / k)
        assert not some[k:].any()
        estimates = [of_dispersion(everything.roll(start), k) for start in range(N_CELLS)]
        torch.testing.assert_close(torch.stack(estimates).mean(0), full)


class TestEveryDispersion:
    """Against double precision, and beyond it against the Poisson distribution, its limit."""

    @pytest.mark.parametrize("log_theta", [-8.0, -3.0, 0.0, 3.9, 4.0, 7.0, 9.0, 12.0, 20.0, 60.0])
    @pytest.mark.parametrize("sparse", [True, False])
    def test_likelihood(self, log_theta, sparse):
        logits, library = torch.randn(20, 200), torch.full((20, 1), 2_000.0)
        mean = 2_000 * torch.softmax(logits.double(), -1)
        counts = torch.poisson(mean).float()
        nonzero = counts.flatten().nonzero().squeeze(1) if sparse else None
        found = negative_binomial_log_likelihood(
            logits, torch.full((200,), log_theta), counts, library, nonzero=nonzero
        )
        if log_theta > 15:
            expected = torch.distributions.Poisson(mean).log_prob(counts.double())
        else:
            theta = torch.tensor(log_theta, dtype=torch.float64).exp()
            x = counts.double()
            expected = x * (mean / (mean + theta)).log() - theta * torch.log1p(mean / theta)
            expected += torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
        torch.testing.assert_close(found.double(), expected.sum(-1), rtol=1e-5, atol=5e-3)

    @pytest.mark.parametrize("log_theta", [-8.0, 0.0, 4.0, 7.0, 12.0, 30.0, 60.0])
    def test_gradients_are_finite_and_right(self, log_theta):
        logits = torch.randn(20, 200, requires_grad=True)
        parameter = torch.full((200,), log_theta, requires_grad=True)
        counts = torch.poisson(2_000 * torch.softmax(logits.detach(), -1))
        library = torch.full((20, 1), 2_000.0)
        negative_binomial_log_likelihood(logits, parameter, counts, library).sum().backward()
        precise = logits.detach().double().requires_grad_(True)
        mean = 2_000 * torch.softmax(precise, -1)
        theta = torch.tensor(min(log_theta, 30.0), dtype=torch.float64).exp()
        (counts * mean.log() - (counts + theta) * torch.log1p(mean / theta)).sum().backward()
        torch.testing.assert_close(logits.grad.double(), precise.grad, rtol=1e-4, atol=1e-3)
        assert parameter.grad.isfinite().all()


class TestShare:
    """Shares of a library."""

    def test_without_a_ceiling_is_a_softmax(self):
        logits = torch.randn(3, 5, dtype=torch.float64)
        torch.testing.assert_close(log_share(logits).exp(), torch.softmax(logits, -1))

    def test_ceiling_adds_a_category_that_is_not_measured(self):
        logits, ceiling = torch.randn(3, 5, dtype=torch.float64), torch.tensor(0.7)
        with_rest = torch.softmax(torch.cat([logits, torch.zeros(3, 1).double()], -1), -1)
        torch.testing.assert_close(log_share(logits, ceiling).exp(), 0.7 * with_rest[:, :-1])

    @pytest.mark.parametrize("size", [-80.0, 80.0])
    def test_extreme_logits_stay_finite(self, size):
        share = log_share(torch.full((1, 4), size), torch.tensor(2.0))
        assert torch.isfinite(share).all()
        assert share.exp().sum() <= 2.0 + 1e-5


OBSERVED_CELLS, OBSERVED_GENES = 12, 6
COUNTS = ("nb", "zinb", "poisson")


def scipy_log_pmf(gene_likelihood, decoded, log_dispersion, x, library) -> np.ndarray:
    mean = (library * torch.softmax(decoded.logits, -1)).numpy()
    theta = log_dispersion.exp().numpy()
    x = x.numpy()
    if gene_likelihood == "normal":
        return scipy.stats.norm.logpdf(x, decoded.logits.numpy(), theta)
    if gene_likelihood == "poisson":
        return scipy.stats.poisson.logpmf(x, mean)
    log_pmf = scipy.stats.nbinom.logpmf(x, theta, theta / (theta + mean))
    if gene_likelihood == "nb":
        return log_pmf
    zero = torch.sigmoid(decoded.zero_inflation_logits).numpy()
    return np.where(x == 0, np.log(zero + (1 - zero) * np.exp(log_pmf)), np.log1p(-zero) + log_pmf)


class TestObservation:
    """The four likelihoods."""

    @pytest.fixture
    def decoded(self) -> Decoded:
        return Decoded(*torch.randn(2, OBSERVED_CELLS, OBSERVED_GENES, dtype=torch.float64))

    @pytest.fixture
    def library(self) -> torch.Tensor:
        return 20 + 50 * torch.rand(OBSERVED_CELLS, 1, dtype=torch.float64)

    @pytest.fixture
    def counts(self) -> torch.Tensor:
        return torch.poisson(3 * torch.rand(OBSERVED_CELLS, OBSERVED_GENES, dtype=torch.float64))

    @pytest.mark.parametrize("per_cell", [False, True], ids=["gene", "gene-batch"])
    @pytest.mark.parametrize("gene_likelihood", [*COUNTS, "normal"])
    def test_log_likelihood(self, gene_likelihood, per_cell, decoded, counts, library):
        shape = (OBSERVED_CELLS, OBSERVED_GENES) if per_cell else (OBSERVED_GENES,)
        log_dispersion = torch.randn(shape, dtype=torch.float64)
        x = counts if gene_likelihood != "normal" else counts - 1.5
        expected = scipy_log_pmf(gene_likelihood, decoded, log_dispersion, x, library).sum(-1)
        found = observation_log_likelihood(gene_likelihood, decoded, log_dispersion, x, library)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)

    @pytest.mark.parametrize("gene_likelihood", COUNTS)
    def test_counts_are_the_library_times_the_share(self, gene_likelihood, decoded, library):
        distribution = observation_distribution(
            gene_likelihood, decoded, torch.zeros(OBSERVED_GENES), library
        )
        share = expected_expression(distribution)
        torch.testing.assert_close(share.sum(-1), torch.ones(OBSERVED_CELLS, dtype=torch.float64))
        mean = library * share
        if gene_likelihood == "zinb":
            mean = mean * (1 - torch.sigmoid(decoded.zero_inflation_logits))
        torch.testing.assert_close(distribution.mean, mean)

    def test_features_are_the_output_of_the_decoder(self, decoded, library):
        distribution = observation_distribution(
            "normal", decoded, torch.zeros(OBSERVED_GENES), library
        )
        assert torch.equal(expected_expression(distribution), decoded.logits)
        assert torch.equal(distribution.get_normalized("scale"), decoded.logits)

    @pytest.mark.parametrize("gene_likelihood", COUNTS)
    def test_expected_log_expression(self, gene_likelihood, decoded, library):
        """Against the sum over all counts that have any probability."""
        log_dispersion = torch.randn(OBSERVED_GENES, dtype=torch.float64) + 1
        distribution = observation_distribution(gene_likelihood, decoded, log_dispersion, library)
        values = torch.arange(2_000, dtype=torch.float64)[:, None, None]
        log_pmf = scipy_log_pmf(
            gene_likelihood,
            decoded,
            log_dispersion,
            values.expand(-1, OBSERVED_CELLS, OBSERVED_GENES),
            library,
        )
        log_expression = np.log2(1 + 1e4 * values.numpy() / library.numpy())
        expected = (np.exp(log_pmf) * log_expression).sum(0)
        found = expected_log_normalized_expression(distribution, library)
        np.testing.assert_allclose(found.numpy(), expected, atol=2e-3)


def brute_force(mean: float, theta: float, library: float, target: float = 1e4) -> float:
    """Sum over all counts that have a probability."""
    p = theta / (theta + mean)
    largest = int(scipy.stats.nbinom.isf(1e-12, theta, p)) + 10
    counts = np.arange(largest + 1)
    probability = scipy.stats.nbinom.pmf(counts, theta, p)
    return float(probability @ np.log2(1 + target * counts / library))


class TestExpectedLogNormalized:
    @pytest.mark.parametrize("library", [300.0, 8_000.0, 80_000.0])
    @pytest.mark.parametrize("theta", [0.05, 1.0, 50.0])
    def test_matches_sum_over_counts(self, library, theta):
        means = [1e-3, 0.05, 0.7, 10.0, 400.0]
        actual = expected_log_normalized(
            torch.tensor([means], dtype=torch.float64),
            torch.full((5,), theta, dtype=torch.float64),
            torch.tensor([[library]], dtype=torch.float64),
        )
        expected = [brute_force(mean, theta, library) for mean in means]
        np.testing.assert_allclose(actual[0], expected, rtol=2e-3, atol=5e-4)

    def test_each_cell_has_its_library_and_each_gene_its_dispersion(self):
        mean = torch.tensor([[0.5, 3.0, 40.0], [2.0, 0.1, 9.0]], dtype=torch.float64)
        theta = torch.tensor([0.3, 2.0, 20.0], dtype=torch.float64)
        library = torch.tensor([[900.0], [20_000.0]], dtype=torch.float64)
        actual = expected_log_normalized(mean, theta, library, target=1e5)
        for cell in range(2):
            for gene in range(3):
                expected = brute_force(
                    mean[cell, gene].item(), theta[gene].item(), library[cell].item(), 1e5
                )
                assert actual[cell, gene].item() == pytest.approx(expected, rel=2e-3)

    def test_does_not_depend_on_what_is_computed_together(self):
        mean = torch.tensor([[0.01, 3.0, 400.0]], dtype=torch.float64)
        theta, library = torch.full((3,), 0.5).double(), torch.full((1, 1), 3e3).double()
        together = expected_log_normalized(mean, theta, library)[0]
        for gene, value in enumerate(together):
            alone = expected_log_normalized(mean[:, [gene]], theta[[gene]], library)
            assert alone.item() == pytest.approx(value.item(), abs=1e-6)

    def test_matches_monte_carlo_with_draws_in_front(self):
        mean = torch.tensor([[[0.5, 3.0]], [[8.0, 60.0]]])
        theta, library = torch.tensor([0.8, 5.0]), torch.tensor([[5_000.0]])
        actual = expected_log_normalized(mean, theta, library)
        assert actual.shape == mean.shape
        counts = torch.distributions.NegativeBinomial(theta, logits=(mean / theta).log()).sample(
            (200_000,)
        )
        estimate = torch.log2(1 + 1e4 * counts / library).mean(0)
        torch.testing.assert_close(actual, estimate, atol=0.01, rtol=0)

    def test_small_effects_keep_their_sign(self):
        """A gene seen in one cell of a thousand, up by a hundredth: lost in the noise of draws."""
        theta, library = torch.ones(1), torch.tensor([[5_000.0]])
        before = expected_log_normalized(torch.tensor([[1e-3]]), theta, library)
        after = expected_log_normalized(torch.tensor([[1.01e-3]]), theta, library)
        assert (after - before).item() == pytest.approx(0.01 * before.item(), rel=0.02)


class TestExpectedLogNormalizedPoisson:
    """Without an inverse dispersion: the limit where it is infinite."""

    @pytest.mark.parametrize("library", [300.0, 8_000.0, 80_000.0])
    def test_matches_sum_over_counts(self, library):
        means = np.array([1e-3, 0.05, 0.7, 10.0, 400.0])
        actual = expected_log_normalized(
            torch.from_numpy(means)[None], None, torch.tensor([[library]], dtype=torch.float64)
        )
        counts = np.arange(700)[:, None]
        expected = scipy.stats.poisson.pmf(counts, means) * np.log2(1 + 1e4 * counts / library)
        np.testing.assert_allclose(actual[0], expected.sum(0), rtol=2e-3, atol=5e-4)

    def test_is_the_limit_of_the_negative_binomial(self):
        mean = torch.tensor([[[0.01, 3.0], [40.0, 0.4]]], dtype=torch.float64)
        library = torch.tensor([[900.0], [20_000.0]], dtype=torch.float64)
        limit = expected_log_normalized(mean, None, library)
        distances = [
            (expected_log_normalized(mean, torch.tensor([theta]).double(), library) - limit).abs()
            for theta in (10.0, 1e3, 1e8)
        ]
        assert (distances[0] > distances[1]).all()
        assert (distances[1] > distances[2]).all()
        torch.testing.assert_close(distances[2], torch.zeros_like(limit), atol=1e-6, rtol=0)
        assert limit.shape == mean.shape
