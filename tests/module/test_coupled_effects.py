"""Effects of perturbations that share nearly all cells, from statistics that lag behind them."""

from __future__ import annotations

import pytest
import torch

from scvi_sams.module.closed_form import ClosedForm
from scvi_sams.module.doses import Doses
from scvi_sams.module.networks import Potential
from scvi_sams.module.posteriors import MaskPrior, SpikeAndSlab

N_CELLS, N_PERTURBATIONS, N_LATENT = 2_000, 60, 4


def _design(guides_per_cell, generator):
    has = torch.rand(N_CELLS, N_PERTURBATIONS, generator=generator)
    has = (has < guides_per_cell / N_PERTURBATIONS).float()
    first = torch.argsort(has, dim=1, descending=True, stable=True)[:, : int(has.sum(1).max())]
    dose = torch.gather(has, 1, first)
    return has, Doses(first * (dose > 0), dose)


def _errors(guides_per_cell, n_epochs=40):
    """Errors of the effects after each epoch, and of least squares, which sees all at once."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(N_PERTURBATIONS, N_LATENT, generator=generator)
    truth *= torch.rand(truth.shape, generator=generator) < 0.3
    has, doses = _design(guides_per_cell, generator)
    noise = torch.randn(N_CELLS, N_LATENT, generator=generator)
    state = has @ truth + 1.1 * noise + 0.5
    gain = torch.full((N_CELLS, N_LATENT), 0.8)
    effects = SpikeAndSlab(MaskPrior(N_PERTURBATIONS, N_LATENT, 0.1), 1.0, False, "learned")
    closed_form = ClosedForm(effects.n_rows, N_LATENT)
    errors, step = [], 0
    for epoch in range(n_epochs):
        for cells in torch.randperm(N_CELLS, generator=generator).split(128):
            of_cells = Doses(doses.perturbation[cells], doses.dose[cells])
            mean, _, of_dose = effects.shift_moments(of_cells)
            potential = Potential(
                state[cells] - closed_form.basal_mean[0], gain[cells], 1 - gain[cells]
            )
            batch = torch.zeros(len(cells), dtype=torch.long)
            closed_form.observe(effects, of_cells, potential, mean, of_dose, batch, N_CELLS)
            step += 1
            if step % 5 == 0:
                closed_form.centre(effects, N_CELLS)
                if effects.masks_on:
                    closed_form.update(effects, N_CELLS)
                elif epoch >= 5:
                    closed_form.switch_on(effects, N_CELLS, torch.Generator().manual_seed(0))
        found = effects.to_network(effects.moments()[0])[:N_PERTURBATIONS]
        errors.append((found - truth).square().mean().sqrt().item())
    centred = has - has.mean(0)
    solved = torch.linalg.lstsq(centred, state - state.mean(0)).solution
    return errors, (solved - truth).square().mean().sqrt().item()


@pytest.mark.parametrize("guides_per_cell", [10, 30])
def test_updates_reach_what_all_cells_say(guides_per_cell):
    """With 30 of 60 in each cell they grew without bounds before the drift was taken out."""
    errors, of_least_squares = _errors(guides_per_cell)
    assert errors[-1] < 2 * of_least_squares
    assert max(errors) < 0.7  # never worse than no effects at all


def test_cells_of_two_have_no_drift():
    generator = torch.Generator().manual_seed(0)
    has, doses = _design(1.0, generator)
    few = has.sum(1) <= 2
    doses = Doses(doses.perturbation[few], doses.dose[few])
    effects = SpikeAndSlab(MaskPrior(N_PERTURBATIONS, N_LATENT, 0.1), 1.0, False, "learned")
    closed_form = ClosedForm(effects.n_rows, N_LATENT)
    state = torch.randn(int(few.sum()), N_LATENT, generator=generator)
    mean, _, of_dose = effects.shift_moments(doses)
    closed_form.observe(
        effects,
        doses,
        Potential(state, torch.full_like(state, 0.8), torch.full_like(state, 0.2)),
        mean,
        of_dose,
        torch.zeros(len(state), dtype=torch.long),
        len(state),
    )
    closed_form.switch_on(effects, len(state), generator)
    present = torch.randn(effects.n_rows, N_LATENT, generator=generator)
    assert (closed_form.statistics.n_together <= 2).all()
    torch.testing.assert_close(closed_form._drift(present), torch.zeros_like(present))
