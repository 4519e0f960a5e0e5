"""A training step does no more than it must, and the same as the plain expressions."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
import torch
from scvi import REGISTRY_KEYS
from scvi.nn import FCLayers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from scvi_sams.module import SAMSVAEModule, likelihood
from scvi_sams.module.networks import SideInputLayers
from scvi_sams.train.guard import AdaptiveClipping

from .minibatches import NONZERO, columns, double, minibatch

if TYPE_CHECKING:
    from types import FrameType

N_CELLS, N_GENES, N_PERTURBATIONS, N_LATENT, N_HIDDEN = 16, 30, 4, 3, 8
PAPER = {
    "global_inference": "gradient",
    "basal_posterior": "amortized",
    "embedding_posterior": "correlated",
}
_RANDOM = {"normal_", "randn", "randn_like", "rand", "rand_like", "uniform_", "bernoulli_"}
_RANDOM |= {"bernoulli", "multinomial", "poisson", "_standard_gamma"}


EXTENSIONS = {
    "reference_doses": [0.5, 1.0, 1.5, 2.0],
    "interactions": [(0, 1), (1, 3)],
    "targets": [2, -1, 0, 2],
}


def make_tensors() -> dict[str, torch.Tensor]:
    """A minibatch with sparse counts, and with their positions."""
    counts = torch.poisson(4 * torch.rand(N_CELLS, N_GENES)) * (torch.rand(N_CELLS, N_GENES) < 0.3)
    counts[:, 0] += 1
    dosage = torch.eye(N_PERTURBATIONS)[torch.randint(0, N_PERTURBATIONS, (N_CELLS,))]
    return minibatch(counts, dosage, **{NONZERO: counts.flatten().nonzero().squeeze(1)})


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return make_tensors()


def make_module(**kwargs) -> SAMSVAEModule:
    sizes = {"n_hidden": N_HIDDEN, "n_latent": N_LATENT, "dropout_rate": 0.0}
    module = SAMSVAEModule(N_GENES, N_PERTURBATIONS, **(sizes | kwargs))
    with torch.no_grad():
        module.effects.slab_mean.normal_()
    module.effects.masks_on = True
    module.n_training_cells = 100
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
    n_counts = len(tensors[NONZERO])
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
    n_counts = (tensors[REGISTRY_KEYS.X_KEY][: module.n_dispersion_cells] > 0).sum()
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
    monkeypatch.setattr(SAMSVAEModule, "n_dispersion_cells", N_CELLS)
    tensors = double(tensors)
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


_OF_UNKNOWN_SHAPE = {"nonzero", "masked_select", "unique_dim", "_unique", "_unique2", "bincount"}
_OF_UNKNOWN_SHAPE |= {"unique_consecutive", "unique_dim_consecutive"}
_NUMBERS = {"_local_scalar_dense", "is_nonzero", "equal"}


def is_called_by(file: str) -> bool:
    """Whether a file is among those that called what is called now."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.endswith(file):
        frame = frame.f_back
    return frame is not None


class Questions(TorchDispatchMode):
    """Notes what a device would have to be waited for, and the shapes of all else.

    The likelihood asks a CPU where the counts of a few cells are; it never asks a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.shapes: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not is_called_by("scvi_sams/module/likelihood.py"):
            name = function.overloadpacket.__name__
            if name in _NUMBERS | _OF_UNKNOWN_SHAPE or _is_by_mask(name, args):
                self.asked.append(name)
            outputs = out if isinstance(out, tuple | list) else [out]
            self.shapes.append(
                (name, *(tuple(t.shape) for t in outputs if isinstance(t, torch.Tensor)))
            )
        return out


def _is_by_mask(name: str, args: tuple) -> bool:
    """Whether elements are taken or set where a mask is true."""
    if name not in {"index", "index_put", "index_put_", "_unsafe_index"}:
        return False
    return any(index is not None and index.dtype == torch.bool for index in args[1])


def train_step(
    module: SAMSVAEModule, tensors: dict[str, torch.Tensor], clipping: AdaptiveClipping
) -> None:
    """What a training step asks of a module, and clipping."""
    module.zero_grad()
    inference, _, output = module(tensors)
    terms = module.global_divergences({})
    (output.loss + sum(terms.values()) / module.n_training_cells).backward()
    module.observe(inference)
    clipping([p for p in module.parameters() if p.grad is not None])


NOTHING_ASKED = {
    "default": {},
    "extensions": EXTENSIONS,
    "direct": {"targets": EXTENSIONS["targets"]},
    "hill": {"reference_doses": EXTENSIONS["reference_doses"]},
    "pairs": {"interactions": EXTENSIONS["interactions"]},
    "given": {"mask_prior": 1.0},
    "residual": {"basal_posterior": "residual", "dispersion": "gene-batch"},
}


@pytest.fixture(params=NOTHING_ASKED)
def settings(request) -> dict:
    return NOTHING_ASKED[request.param]


def some_doses() -> dict[str, torch.Tensor]:
    """Controls, singles, pairs and triples, in as many columns as the most that there may be."""
    dosage = torch.rand(N_CELLS, N_PERTURBATIONS) + 0.5
    return columns(dosage * (torch.rand(N_CELLS, N_PERTURBATIONS) < 0.4), N_PERTURBATIONS)


@pytest.mark.parametrize("waits", [False, True])
def test_nothing_asks_for_a_number(settings, waits):
    """All is launched at once, whatever the cells have and whatever it gives."""
    module, clipping, shapes = make_module(**settings), AdaptiveClipping(2.0), []
    module.closed_form.statistics.waits = waits
    for _ in range(3):
        tensors = make_tensors() | some_doses()
        del tensors[NONZERO]  # as many as there are
        with Questions() as questions:
            train_step(module, tensors, clipping)
        assert questions.asked == []
        shapes.append(questions.shapes)
    assert len(shapes[0]) > 100
    assert shapes[1] == shapes[2]  # clipping begins with the first


@pytest.mark.parametrize(
    "ask",
    [
        lambda t: t.sum().item(),
        lambda t: bool(t.any()),
        lambda t: t[t > 0],
        lambda t: t.nonzero(),
        lambda t: t.unique(),
        lambda t: t.masked_select(t > 0),
        lambda t: t.clone().masked_fill_(t > 0, 1.0)[t > 0],
        lambda t: t.clone().__setitem__(t > 0, torch.ones(int((t > 0).sum()))),
    ],
)
def test_questions_are_noticed(ask):
    with Questions() as questions:
        ask(torch.randn(5))
    assert questions.asked


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("waits", [False, True])
def test_a_gpu_is_not_waited_for(settings, waits):
    """By torch's own count; with several batches too, of which scvi-tools sees the codes."""
    module = make_module(n_batch=2, encode_covariates=True, **settings).cuda()
    module.closed_form.statistics.waits = waits
    tensors = {key: value.cuda() for key, value in (make_tensors() | some_doses()).items()}
    clipping = AdaptiveClipping(2.0)
    train_step(module, tensors, clipping)  # the first step starts libraries
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            train_step(module, tensors, clipping)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert module.px_r.grad.isfinite().all()
    assert bool(module.closed_form.statistics.n_cells_seen > 0) is not waits
