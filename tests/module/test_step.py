"""A training step does no more than it must, and the same as the plain expressions."""

from __future__ import annotations

import pytest
import torch
from scvi import REGISTRY_KEYS
from scvi.nn import FCLayers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from scvi_sams._constants import SAMS_REGISTRY_KEYS
from scvi_sams.module import SAMSVAEModule, base, likelihood
from scvi_sams.module.networks import SideInputLayers

N_CELLS, N_GENES, N_PERTURBATIONS, N_LATENT, N_HIDDEN = 16, 30, 4, 3, 8
PAPER = {
    "global_inference": "gradient",
    "basal_posterior": "amortized",
    "embedding_posterior": "correlated",
}
_RANDOM = {"normal_", "randn", "randn_like", "rand", "rand_like", "uniform_", "bernoulli_"}
_RANDOM |= {"bernoulli", "multinomial", "poisson", "_standard_gamma"}


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """A minibatch with sparse counts, and with their positions."""
    counts = torch.poisson(4 * torch.rand(N_CELLS, N_GENES)) * (torch.rand(N_CELLS, N_GENES) < 0.3)
    counts[:, 0] += 1
    return {
        REGISTRY_KEYS.X_KEY: counts,
        REGISTRY_KEYS.BATCH_KEY: torch.zeros(N_CELLS, 1, dtype=torch.long),
        SAMS_REGISTRY_KEYS.PERTURBATION_KEY: torch.eye(N_PERTURBATIONS)[
            torch.randint(0, N_PERTURBATIONS, (N_CELLS,))
        ],
        SAMS_REGISTRY_KEYS.NONZERO_COUNTS_KEY: counts.flatten().nonzero().squeeze(1),
    }


def make_module(**kwargs) -> SAMSVAEModule:
    sizes = {"n_hidden": N_HIDDEN, "n_latent": N_LATENT, "dropout_rate": 0.0}
    module = SAMSVAEModule(N_GENES, N_PERTURBATIONS, **sizes, **kwargs)
    with torch.no_grad():
        module.effects.slab_mean.normal_()
        module.effects.masks_on.fill_(True)
    return module.train()


def run(module, tensors, n_particles=1):
    kwargs = {"n_samples": n_particles} if n_particles > 1 else None
    inference, generative, output = module(tensors, inference_kwargs=kwargs)
    loss = output.loss
    if module.closed_form is None:
        loss = loss + sum(module.global_divergences().values()) / N_CELLS
    return inference, generative, loss


class Elements(TorchDispatchMode):
    """Counts the elements that operations give."""

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self.names, self.count = names, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in self.names:
            self.count += out.numel()
        return out


@pytest.mark.parametrize("n_particles", [1, 5])
def test_counts_are_encoded_once_a_cell(tensors, n_particles):
    module = make_module(**PAPER)
    with FlopCounterMode(display=False) as counter:
        module.encoder(
            tensors[REGISTRY_KEYS.X_KEY], side_input=torch.randn(n_particles, N_CELLS, N_LATENT)
        )
    once = N_GENES * N_HIDDEN
    a_particle = N_LATENT * N_HIDDEN + 2 * N_HIDDEN * N_LATENT
    assert counter.get_total_flops() == 2 * N_CELLS * (once + n_particles * a_particle)


@pytest.mark.parametrize("n_particles", [1, 5])
def test_gamma_functions_once_a_count(tensors, n_particles):
    """For each count that is not zero, and for each gene, however many particles."""
    module = make_module(**PAPER)
    n_counts = len(tensors[SAMS_REGISTRY_KEYS.NONZERO_COUNTS_KEY])
    assert n_counts < N_CELLS * N_GENES
    with Elements({"lgamma"}) as forward:
        loss = run(module, tensors, n_particles)[-1]
    assert forward.count == 2 * n_counts + N_GENES
    with Elements({"lgamma"}) as backward:
        loss.backward()
    assert backward.count == 0


def test_digamma_functions_only_at_counts_of_few_cells(tensors):
    module = make_module()
    loss = run(module, tensors)[-1]
    with Elements({"digamma"}) as backward:
        loss.backward()
    n_counts = (tensors[REGISTRY_KEYS.X_KEY][: base._N_DISPERSION_CELLS] > 0).sum()
    assert backward.count == 2 * n_counts


@pytest.mark.parametrize("n_particles", [1, 3])
def test_closed_form_draws_nothing_but_states(tensors, n_particles):
    module = make_module()
    with Elements(_RANDOM) as drawn:
        run(module, tensors, n_particles)
    assert drawn.count == n_particles * N_CELLS * N_LATENT


def test_distribution_is_formed_where_it_is_read(tensors):
    module = make_module()
    inference, generative, _ = run(module, tensors)
    assert "px" not in generative
    assert "px" in module(tensors, compute_loss=False)[1]
    assert "px" in module(tensors, generative_kwargs={"give_distribution": True})[1]
    assert "px" in module.generative(inference["z"], inference["library"])
    assert "px" in module.eval()(tensors)[1]


def plain_log_likelihood(logits, log_theta, counts, library, n_cells, ceiling, nonzero):
    """The likelihood of torch, differentiated by torch."""
    assert ceiling is None
    log_mean = torch.log_softmax(logits, -1) + library.log()
    px = torch.distributions.NegativeBinomial(log_theta.exp(), logits=log_mean - log_theta)
    return px.log_prob(counts).sum(-1)


class JoinedInputs(SideInputLayers):
    """The encoder's layers with the counts repeated for each particle."""

    def forward(self, x, *categories, cont=None, side_input=None):
        if side_input is not None:
            x = torch.cat([x.expand(*side_input.shape[:-2], *x.shape), side_input], -1)
        return FCLayers.forward(self, x, *categories, cont=cont)


@pytest.mark.parametrize(
    ("settings", "n_particles"), [({}, 1), (PAPER, 1), (PAPER, 5)], ids=["default", "one", "five"]
)
def test_training_is_that_of_the_plain_expressions(tensors, settings, n_particles, monkeypatch):
    """Parameters after steps of Adam in double precision, from the same draws."""
    monkeypatch.setattr(base, "_N_DISPERSION_CELLS", N_CELLS)
    tensors = {k: t.double() if t.is_floating_point() else t for k, t in tensors.items()}
    start = make_module(**settings).double()
    trained = []
    for is_plain in (False, True):
        module = make_module(**settings).double()
        module.load_state_dict(start.state_dict())
        if is_plain:
            name = "negative_binomial_log_likelihood"
            monkeypatch.setattr(likelihood, name, plain_log_likelihood)
            module.encoder.hidden.__class__ = JoinedInputs
        optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=0.01)
        torch.manual_seed(0)
        for _ in range(20):
            optimizer.zero_grad()
            run(module, tensors, n_particles)[-1].backward()
            optimizer.step()
        trained.append(module.state_dict())
    fast, plain = trained
    assert (fast["px_r"] - start.px_r).abs().max() > 0.05  # it has learned
    for name, expected in plain.items():
        torch.testing.assert_close(fast[name], expected, rtol=1e-6, atol=1e-8, msg=name)
