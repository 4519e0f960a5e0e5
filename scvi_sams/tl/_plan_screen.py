"""What a larger, smaller, deeper or shallower screen of the same perturbations would find."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from scvi_sams._arguments import checked
from scvi_sams._exceptions import ScreenError
from scvi_sams.model.read_outs import check_level
from scvi_sams.tl._mechanisms import mechanisms
from scvi_sams.tl.call_power import (
    CallingProblem,
    bayesian_calls,
    calling_problem,
    depth_factor,
    learned_effects,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from scvi_sams.model import SAMSVAE
    from scvi_sams.tl.call_power import LearnedEffects


_MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # of the cells of the fit, by default
_MECHANISM = 2.0  # standard deviations of the background, beyond which an effect stands out of it


def plan_screen(
    model: SAMSVAE,
    cells: float | Sequence[float] | None = None,
    *,
    controls: float | Sequence[float] | None = None,
    depth: float | Sequence[float] = 1.0,
    guides: int | Sequence[int] = 1,
    guide_variation: float = 0.0,
    replicates: int | Sequence[int] = 1,
    replicate_variation: float = 0.0,
    fdr: float = 0.1,
    n_samples: int = 200,
    credible_level: float = 0.9,
    seed: int = 0,
) -> pd.DataFrame:
    r"""How many mechanisms a screen of another size would recover, from a fitted pilot.

    How many effects there are of each size is learned from the scores of the fit, on the latents
    that some perturbation moves: a mixture of normals at zero with noise of known variance
    (Stephens, Biostatistics 18, 275, 2017). For each of ``n_samples`` draws of effects from their
    posterior, and each design, the scores that the cells of the design would show are drawn, as in
    :func:`detectable_effects`, and masks are called as :func:`mechanisms` does without a null.
    No cell is simulated and no network is trained, so that a hundred designs take seconds. A
    mechanism is an effect that stands out of the background: of more than two of its standard
    deviations, ``mask_evidence_cells ** -0.5``.

    The curvature :math:`c` grows with the number of cells, and :math:`c_0`, of the basal mean,
    with that of controls. Of the depth it depends through what counts tell of a cell's state,
    :math:`g = p / (1 + p)`: the information :math:`p` is proportional to
    :math:`\sum_g (\partial \mu_g)^2 / (\mu_g / k + \mu_g^2 / \theta_g)` at :math:`k` times the
    depth, which saturates where overdispersion is most of the noise. Guides of a gene, and
    replicates, that differ in what they do make the effect of a gene differ from screen to screen
    by their relative standard deviation, over the root of their number.

    That the networks and the latents are learned from the same cells is not in the formula, and
    latents that the pilot has not found are not there: for screens much larger than the pilot the
    numbers are a lower bound, and their intervals too narrow. What was promised from a quarter and
    a half of the cells, and what was found in all, is printed by
    ``python -m benchmarks detectable_effects``. Numbers of perturbations are safer than those of
    mechanisms, which a small pilot with wrong latents counts twice.

    Parameters
    ----------
    model
        A trained model with masks from closed-form updates: the pilot.
    cells
        Mean number of cells a perturbation, spread over perturbations as in the pilot; one or
        several. By default a quarter to eight times as many as in the pilot.
    controls
        Number of control cells, one or several; by default as many for each other cell as in the
        pilot.
    depth
        Counts a cell, as a multiple of the pilot's; one or several.
    guides, guide_variation
        Guides a gene, among which the cells of the gene are divided, and the standard deviation of
        their effects, as a share of the mean effect.
    replicates, replicate_variation
        The same of replicates.
    fdr
        False discovery rate of the calls.
    n_samples
        Draws of effects and scores.
    credible_level
        Level of the intervals: of effects and scores together, what one screen would give.
    seed
        Seed of the draws.

    Returns
    -------
    pandas.DataFrame
        A row a design, every combination of what was given:

        * ``cells``, ``controls``, ``depth``, ``guides``, ``replicates``, and ``total_cells`` of
          all perturbations and controls
        * ``mechanisms``, ``mechanisms_lower``, ``mechanisms_upper``: those called that are true,
          with the sign that they have, and their interval; ``mechanisms_share``: of all that are
          there, on the latents that the pilot uses
        * ``false_share``: expected share of the calls that are false
        * ``perturbations``, ``perturbations_lower``, ``perturbations_upper``,
          ``perturbations_share``: the same, of perturbations with a mechanism that is called

        ``attrs`` holds the pilot's own ``cells``, ``controls``, ``n_perturbations``,
        ``mechanisms_called`` and ``perturbations_called``, beside ``fdr`` and ``credible_level``.

    Raises
    ------
    NotImplementedError
        If the model has no masks, they were learned by gradient, it is a query, or ``depth`` is
        asked of a model that is not of counts.
    ScreenError
        If no mask is on, a number cannot be used, or several guides or replicates come without
        their variation.

    Examples
    --------
    >>> table = scvi_sams.tl.plan_screen(pilot, [50, 100, 200], depth=[0.5, 1])  # doctest: +SKIP
    >>> scvi_sams.pl.plan_screen(table)  # doctest: +SKIP
    """
    fdr, n_samples = checked("fdr", fdr), checked("n_samples", n_samples)
    check_level(credible_level)
    seed = checked("seed", seed)
    pilot = _pilot(model)
    several = {
        "cells": _numbers("cells", cells, [m * pilot.n_cells for m in _MULTIPLES]),
        "controls": _numbers("controls", controls, [np.nan]),
        "depth": _numbers("depth", depth, [1.0]),
        "guides": _numbers("guides", guides, [1], whole=True),
        "replicates": _numbers("replicates", replicates, [1], whole=True),
    }
    variation = {"guide": guide_variation, "replicate": replicate_variation}
    for name, value in variation.items():
        if value != 0 and not _is_number(value, whole=False):
            raise ScreenError(f"{name}_variation={value!r} cannot be used: give a number >= 0.")
        if value == 0 and max(several[f"{name}s"]) > 1:
            raise ScreenError(
                f"{name}s={max(several[f'{name}s']):.0f}: their number matters as far as they "
                f"differ in what they do; give {name}_variation, such as 0.3."
            )
    depths = {value: depth_factor(model, value) for value in several["depth"]}
    rows = []
    for n_cells, n_controls, k, n_guides, n_replicates in product(*several.values()):
        factor = n_cells / pilot.n_cells
        if np.isnan(n_controls):
            n_controls = factor * pilot.n_controls
        problem = calling_problem(
            model, "plan_screen", factor, n_controls / pilot.n_controls, depths[k]
        )
        spread = np.hypot(
            guide_variation / np.sqrt(n_guides), replicate_variation / np.sqrt(n_replicates)
        )
        # The same draws for every design, so that designs differ by what they are alone.
        rng = np.random.default_rng(seed)
        found = _screens(pilot, problem, factor, spread, fdr, n_samples, rng)
        design = {
            "cells": n_cells,
            "controls": n_controls,
            "depth": k,
            "guides": int(n_guides),
            "replicates": int(n_replicates),
            "total_cells": n_cells * len(pilot.learned.rows) + n_controls,
        }
        rows.append(design | _summary(found, credible_level))
    table = pd.DataFrame(rows)
    called = mechanisms(model, fdr, ()).query("called")
    table.attrs = {
        "cells": pilot.n_cells,
        "controls": pilot.n_controls,
        "n_perturbations": len(pilot.learned.rows),
        "mechanisms_called": len(called),
        "perturbations_called": called["perturbation"].nunique(),
        "fdr": fdr,
        "credible_level": credible_level,
    }
    return table


class _Pilot(NamedTuple):
    """Effects of a pilot, mean number of cells a perturbation, and number of controls."""

    learned: LearnedEffects
    n_cells: float
    n_controls: float


def _pilot(model: SAMSVAE) -> _Pilot:
    learned = learned_effects(model, calling_problem(model, "plan_screen"))
    if learned.effects is None:
        raise ScreenError(
            "plan_screen: no mask of this fit is on, so that there is no effect to plan with: a "
            "pilot must show some. See detectable_effects() for what it would have shown."
        )
    statistics = model.module.closed_form.statistics
    n = len(model.perturbation_names)
    n_training = model.module.n_training_cells
    n_cells = statistics.n_cells(n_training)[:n, 0].double().cpu().numpy()
    # A cell with several perturbations is counted once.
    n_perturbed = (n_cells / statistics.n_together[:n, 0].clamp(min=1).cpu().numpy()).sum()
    n_controls = max(float(n_training - n_perturbed), 1.0)
    return _Pilot(learned, float(n_cells[learned.rows].mean()), n_controls)


def _numbers(
    name: str, given: float | Sequence[float] | None, default: list[float], whole: bool = False
) -> list[float]:
    if given is None:
        return default
    values: list[Any] = list(given) if isinstance(given, Iterable) else [given]
    if not values or not all(_is_number(value, whole) for value in values):
        kind = "positive whole numbers" if whole else "positive numbers"
        raise ScreenError(f"{name}={given!r} cannot be used: give {kind}, one or several.")
    return [float(value) for value in values]


def _is_number(value: Any, whole: bool) -> bool:
    if isinstance(value, bool | np.bool_) or not isinstance(value, Real):
        return False
    return 0 < float(value) < np.inf and (not whole or float(value).is_integer())


class _Screens(NamedTuple):
    """Numbers in each drawn screen."""

    there: NDArray[np.float64]
    recovered: NDArray[np.float64]
    called: NDArray[np.float64]
    perturbations_there: NDArray[np.float64]
    perturbations_recovered: NDArray[np.float64]


def _screens(
    pilot: _Pilot,
    problem: CallingProblem,
    factor: float,
    spread: float,
    fdr: float,
    n_samples: int,
    rng: np.random.Generator,
) -> _Screens:
    """Draw effects, then the scores that a design would give, and call."""
    rows, latents, effects, background = pilot.learned
    assert effects is not None
    problem = CallingProblem(*(values[np.ix_(rows, latents)] for values in problem))
    # What the pilot has of noise beyond that of its cells comes of networks trained on few.
    excess = 1 + (effects.excess - 1) / max(factor, 1.0)
    own = np.sqrt(excess * problem.curvature)
    # That of the basal mean is one number a latent, whatever the perturbation.
    common = np.sqrt(excess * np.maximum(problem.variance - problem.curvature, 0))
    counts = []
    for _ in range(n_samples):
        effect = effects.sample(rng)
        effect = effect * (1 + spread * rng.standard_normal((len(effect), 1)))
        noise = own * rng.standard_normal(effect.shape)
        noise += common * rng.standard_normal((1, len(latents)))
        score = problem.curvature * effect + noise
        called = bayesian_calls(problem.log_odds(score), fdr)
        mask = np.abs(effect) > _MECHANISM * background
        right = called & mask & (np.sign(score) == np.sign(effect))
        counts.append(
            (mask.sum(), right.sum(), called.sum(), mask.any(1).sum(), right.any(1).sum())
        )
    return _Screens(*np.array(counts, dtype=np.float64).T)


def _summary(found: _Screens, credible_level: float) -> dict[str, float]:
    tail = 0.5 - credible_level / 2
    summary = {}
    for name, number, there in (
        ("mechanisms", found.recovered, found.there),
        ("perturbations", found.perturbations_recovered, found.perturbations_there),
    ):
        summary[name] = float(number.mean())
        lower, upper = np.quantile(number, [tail, 1 - tail])
        summary |= {f"{name}_lower": float(lower), f"{name}_upper": float(upper)}
        summary[f"{name}_share"] = float(number.sum() / max(there.sum(), 1))
        if name == "mechanisms":
            false = (found.called - number) / np.maximum(found.called, 1)
            summary["false_share"] = float(false.mean())
    return summary
