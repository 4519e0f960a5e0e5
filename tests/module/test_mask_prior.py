"""The learned prior probability of masks, against its bound, Monte Carlo and torch."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Bernoulli, Beta

from scvi_sams.module import MaskPrior

N_PERTURBATIONS, N_LATENT = 6, 4
SHARING = ("all", "latent", "perturbation")


def bound(prior: MaskPrior, logits: torch.Tensor) -> torch.Tensor:
    return prior.kl_masks(logits).sum() + prior.kl_probability()


@pytest.fixture
def logits() -> torch.Tensor:
    return 2 * torch.randn(N_PERTURBATIONS, N_LATENT, dtype=torch.float64)


class TestLearned:
    @pytest.mark.parametrize("shared_by", SHARING)
    def test_update_minimises_the_divergence(self, logits, shared_by):
        prior = MaskPrior(N_PERTURBATIONS, N_LATENT, (1.0, 5.0), shared_by).double()
        before = bound(prior, logits)
        prior.update(torch.sigmoid(logits))
        after = bound(prior, logits)
        assert after < before
        for parameter in (prior.posterior_a, prior.posterior_b):
            for factor in (0.9, 1.1):
                optimum = parameter.clone()
                parameter.mul_(factor)
                assert bound(prior, logits) > after
                parameter.copy_(optimum)

    @pytest.mark.parametrize("shared_by", SHARING)
    def test_divergence_matches_monte_carlo(self, logits, shared_by):
        prior = MaskPrior(N_PERTURBATIONS, N_LATENT, (2.0, 3.0), shared_by).double()
        prior.update(torch.sigmoid(logits))
        posterior = Beta(prior.posterior_a, prior.posterior_b)
        draws = posterior.sample((100_000,))
        masks = torch.bernoulli(torch.sigmoid(logits).expand(100_000, -1, -1))
        log_masks = Bernoulli(logits=logits).log_prob(masks) - Bernoulli(draws).log_prob(masks)
        hyperprior = Beta(torch.tensor(2.0).double(), torch.tensor(3.0).double())
        log_draws = posterior.log_prob(draws) - hyperprior.log_prob(draws)
        estimates = log_masks.sum((1, 2)) + log_draws.sum((1, 2))
        error = estimates.std() / 100_000**0.5
        assert abs(estimates.mean() - bound(prior, logits)) < 5 * error

    def test_probabilities_follow_their_masks(self):
        masks = torch.zeros(N_PERTURBATIONS, N_LATENT)
        masks[0], masks[:, 1] = 1, 1
        by_perturbation = MaskPrior(N_PERTURBATIONS, N_LATENT, (1.0, 1.0), "perturbation")
        by_perturbation.update(masks)
        assert by_perturbation.mean().shape == (N_PERTURBATIONS, 1)
        assert by_perturbation.mean()[0].item() == pytest.approx(5 / 6)
        by_latent = MaskPrior(N_PERTURBATIONS, N_LATENT, (1.0, 1.0), "latent")
        by_latent.update(masks)
        assert by_latent.mean()[0, 1].item() == pytest.approx(7 / 8)

    def test_rows(self, logits):
        prior = MaskPrior(N_PERTURBATIONS, N_LATENT, (1.0, 5.0), "perturbation").double()
        prior.update(torch.sigmoid(logits))
        rows = torch.tensor([4, 1])
        torch.testing.assert_close(
            prior.kl_masks(logits[rows], rows), prior.kl_masks(logits)[rows]
        )


class TestFixed:
    def test_is_never_updated(self, logits):
        prior = MaskPrior(N_PERTURBATIONS, N_LATENT, 0.1)
        prior.update(torch.sigmoid(logits))
        assert prior.mean().item() == pytest.approx(0.1)
        assert prior.logit().sigmoid().item() == pytest.approx(0.1)
        assert prior.kl_probability() == 0

    def test_one_is_no_sparsity(self, logits):
        prior = MaskPrior(N_PERTURBATIONS, N_LATENT, 1.0)
        assert not prior.sparse
        assert not prior.kl_masks(logits).any()

    @pytest.mark.parametrize("probability", [0.0, -0.1, 1.5, (0.0, 1.0), (1.0, -2.0)])
    def test_impossible(self, probability):
        with pytest.raises(ValueError, match="mask_prior="):
            MaskPrior(N_PERTURBATIONS, N_LATENT, probability)

    def test_unknown_sharing(self):
        with pytest.raises(ValueError, match="'gene' is unknown; use all, latent, perturbation"):
            MaskPrior(N_PERTURBATIONS, N_LATENT, (1.0, 1.0), "gene")
