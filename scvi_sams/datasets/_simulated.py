"""Screens with a known mechanism: every mask, effect and basal state that made the counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from scvi_sams._exceptions import ScreenError
from scvi_sams.datasets._simulation import (
    CELLS_PER_CHUNK,
    annotated,
    check_parameters,
    draw_conditions,
    draw_masks,
    draw_pairs,
    numbered_names,
    scaled_rates,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import anndata as ad
    from numpy.random import Generator
    from numpy.typing import NDArray

_N_HIDDEN = 64
_BENCHMARK: dict[str, Any] = {
    "n_cells": 20_000,
    "n_genes": 1_000,
    "n_perturbations": 200,
    "n_pairs": 60,
    "n_latent": 20,
    "mask_probability": 0.1,
    "effect_size": 2.0,
    "library_size": 8_000.0,
    "n_batches": 1,
}
_SMALL = {"n_cells": 6_000, "n_genes": 500, "n_perturbations": 60, "n_pairs": 20, "n_latent": 10}
_VARIANTS: dict[str, dict[str, Any]] = {
    "default": _BENCHMARK,
    "weak": _BENCHMARK | {"effect_size": 1.0},
    "shallow": _BENCHMARK | {"effect_size": 1.5, "library_size": 1_500.0},
    "small": _BENCHMARK | _SMALL | {"mask_probability": 0.2},
}


def simulated_screen(
    n_cells: int = 4_000,
    n_genes: int = 500,
    n_perturbations: int = 30,
    n_pairs: int = 8,
    n_latent: int = 8,
    *,
    mask_probability: float = 0.15,
    inactive_fraction: float = 0.0,
    effect_size: float = 2.0,
    effect_jitter: float = 0.3,
    control_fraction: float = 0.1,
    pair_fraction: float = 0.25,
    library_size: float = 8_000.0,
    library_spread: float = 0.3,
    inverse_dispersion: float = 5.0,
    n_batches: int = 2,
    batch_effect_size: float = 0.2,
    interaction_fraction: float = 0.0,
    doses: Sequence[float] = (),
    n_contexts: int = 1,
    context_fraction: float = 0.0,
    context_spread: float = 1.0,
    batch_variation: float = 0.0,
    seed: int = 0,
) -> ad.AnnData:
    r"""Simulate a Perturb-seq screen whose sparse mechanism is known.

    Perturbation :math:`t` moves the latents of its mask :math:`m_t` by its embedding
    :math:`e_t`; a pair moves them by the sum of its parts:

    .. math::

        m_{tl} &\sim \mathrm{Bernoulli}(\pi), \qquad
        e_{tl} = \pm\,\mathrm{effect\_size} + \mathrm{effect\_jitter} \cdot \mathcal N(0, 1) \\
        z_i &= z^b_i + \textstyle\sum_t d_{it}\, m_t \odot e_t, \qquad
        z^b_i \sim \mathcal N(0, I) \\
        h_i &= \tanh(z_i W_1) + 0.2\, z_i W_1 \\
        x_{ig} &\sim \mathrm{NegativeBinomial}\bigl(
            l_i\, \mathrm{softmax}_g(a_g + b_{s_i g} + h_i W_2),\ \theta \bigr)

    with gene intercepts :math:`a_g \sim \mathcal N(-1, 1.2^2)`, batch shifts
    :math:`b_{sg} \sim \mathcal N(0, \mathrm{batch\_effect\_size}^2)` (none in the first batch)
    and log-normal library sizes :math:`l_i`. A mask that comes out empty is given one latent at
    random, so that every perturbation that is not inactive does something.

    On request, some pairs move one more latent by :math:`\pm\,\mathrm{effect\_size}`, and effects
    follow the dose of each cell by a Hill curve,
    :math:`d^{h_t} / (d^{h_t} + \mathrm{EC50}_t^{h_t})`. With several contexts, such as cell types,
    basal states lie about a mean of their context, and some perturbations act differently in one
    of them: an effect on one latent is lost, has the other sign, or is there alone.

    Parameters
    ----------
    n_cells
        Cells, of every kind together.
    n_genes
        Genes.
    n_perturbations
        Perturbations, named ``"P001"``, ``"P002"`` and so on.
    n_pairs
        Distinct pairs of perturbations that are measured together (``"P001+P014"``).
    n_latent
        Latents that perturbations can move.
    mask_probability
        Probability that a perturbation moves a latent.
    inactive_fraction
        Share of the perturbations that move nothing.
    effect_size
        Size of an effect, in standard deviations of the basal state.
    effect_jitter
        Standard deviation of the effects about plus or minus ``effect_size``.
    control_fraction
        Share of the cells without a perturbation.
    pair_fraction
        Share of the cells with a pair; unused if ``n_pairs`` is 0. The other cells carry one
        perturbation each, drawn uniformly.
    library_size
        Median library size, in counts a cell.
    library_spread
        Standard deviation of the logarithm of the library size.
    inverse_dispersion
        Inverse dispersion of the counts, the same for all genes.
    n_batches
        Batches; cells fall into them at random.
    batch_effect_size
        Standard deviation over genes of a batch's shift of log expression.
    interaction_fraction
        Share of the pairs that move a latent beyond the sum of their parts.
    doses
        Positive doses, of which every perturbation of a cell gets one at random. The EC50 of a
        perturbation is drawn uniformly, in logarithm, between the smallest and the largest of
        them; slopes are log-normal about 1.5. None are recorded by default, and effects are whole.
    n_contexts
        Contexts; cells fall into them at random.
    context_fraction
        Share of the perturbations whose effect on one latent is another in one of the contexts.
    context_spread
        Standard deviation of the mean basal states of contexts.
    batch_variation
        Standard deviation between batches, as of donors, of the effect of every perturbation on
        every latent.
    seed
        Seed of all randomness. The truth (masks, embeddings, pairs, decoder, batch shifts) is
        drawn from a stream of its own: it does not change with the number or depth of the cells.

    Returns
    -------
    anndata.AnnData
        Cells x genes, whose counts (CSR, float32) are in ``X`` and ``layers["counts"]``:

        * ``obs["perturbation"]``: ``"control"``, ``"P001"`` or ``"P001+P014"``
        * ``obs["dose"]``, with ``doses``: ``""``, ``"0.3"`` or ``"0.3+10.0"``
        * ``obs["replicate"]``: the batch
        * ``obs["context"]``, with several contexts: ``"context_1"`` and so on
        * ``obs["total_counts"]``: counts of the cell
        * ``obsm["true_basal"]``: basal state (cells x latents)
        * ``uns["truth"]``: ``"mask"``, ``"embedding"`` and ``"effect"`` (their product), each
          perturbations x latents, with ``"perturbation_names"``, ``"seed"`` and
          ``"parameters"``; ``"interaction"`` (pairs x latents, pairs named in ``"pair_names"``),
          ``"ec50"`` and ``"slope"`` (of each perturbation), ``"context_difference"``
          and ``"batch_difference"`` (perturbations x contexts, or batches, x latents, to be added
          to ``"effect"``) where they were asked for

    Raises
    ------
    ScreenError
        If an argument is out of its range.

    Notes
    -----
    The generative model is that of Bereket and Karaletsos (NeurIPS 2023), section 3, with a
    decoder that no network of the package can match exactly.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=500, seed=1)
    >>> adata.uns["truth"]["mask"].shape
    (30, 8)
    """
    # First of all, while the arguments are the only local names.
    parameters = check_parameters({k: v for k, v in locals().items() if k != "doses"})
    doses = [float(dose) for dose in doses]
    if not all(0 < dose < np.inf for dose in doses):
        raise ScreenError(f"`doses` must be positive and finite, not {doses}.")
    if doses:
        parameters["doses"] = doses  # an empty list does not survive an h5ad
    # What came later has a stream of its own, so that it changes nothing of what was there.
    streams = np.random.default_rng(seed).spawn(5)
    truth_rng, cell_rng, extension_rng, context_rng, batch_rng = streams

    mask = draw_masks(truth_rng, n_perturbations, n_latent, mask_probability, inactive_fraction)
    embedding = effect_jitter * truth_rng.standard_normal(mask.shape)
    embedding += effect_size * truth_rng.choice([-1.0, 1.0], mask.shape)
    effect = mask * embedding
    names = numbered_names("P", n_perturbations, min_width=3)
    first, second = draw_pairs(truth_rng, n_perturbations, n_pairs)
    w_in = truth_rng.standard_normal((n_latent, _N_HIDDEN)) / np.sqrt(n_latent)
    w_out = truth_rng.standard_normal((_N_HIDDEN, n_genes)) / np.sqrt(_N_HIDDEN)
    intercept = truth_rng.normal(-1.0, 1.2, n_genes)
    batch_shift = batch_effect_size * truth_rng.standard_normal((n_batches, n_genes))
    batch_shift[0] = 0.0
    # Shifts of some pairs beyond the sum of their parts, on one latent each.
    interaction = np.zeros((n_pairs, n_latent))
    beyond = extension_rng.permutation(n_pairs)[: round(interaction_fraction * n_pairs)]
    sizes = effect_size * extension_rng.choice([-1.0, 1.0], len(beyond))
    interaction[beyond, extension_rng.integers(n_latent, size=len(beyond))] = sizes
    truth: dict[str, Any] = {"mask": mask, "embedding": embedding, "effect": effect}
    truth |= {"seed": seed, "parameters": parameters}
    if interaction_fraction > 0:
        both = [f"{names[a]}+{names[b]}" for a, b in zip(first, second, strict=True)]
        truth |= {"interaction": interaction, "pair_names": np.array(both, object)}

    # Conditions in the order control, singles, pairs; a cell is a row number of these tables.
    condition = draw_conditions(
        cell_rng, n_cells, n_perturbations, n_pairs, control_fraction, pair_fraction
    )
    batch = cell_rng.integers(n_batches, size=n_cells)
    basal = cell_rng.standard_normal((n_cells, n_latent))
    library = cell_rng.lognormal(np.log(library_size), library_spread, (n_cells, 1))
    of_pair = np.vstack([np.zeros((1 + n_perturbations, n_latent)), interaction])[condition]
    # Members of each condition, with a row of zeros for none at the end.
    members = np.full((1 + n_perturbations + n_pairs, 2), n_perturbations)
    members[1 : 1 + n_perturbations, 0] = np.arange(n_perturbations)
    members[1 + n_perturbations :] = np.column_stack([first, second])
    members = members[condition]
    parts = np.vstack([effect, np.zeros((1, n_latent))])[members]
    if n_contexts > 1:
        difference, centres = _draw_contexts(
            context_rng, effect, n_contexts, context_fraction, context_spread, effect_size
        )
        truth["context_difference"] = difference
        context = context_rng.integers(n_contexts, size=n_cells)
        basal += centres[context]
        nothing = np.zeros((1, *difference.shape[1:]))
        parts += np.vstack([difference, nothing])[members, context[:, None]]
    if batch_variation > 0:
        difference = batch_rng.standard_normal((n_perturbations, n_batches, n_latent))
        truth["batch_difference"] = batch_variation * difference
        nothing = np.zeros((1, n_batches, n_latent))
        parts += np.vstack([truth["batch_difference"], nothing])[members, batch[:, None]]
    if doses:
        ends = np.log(min(doses)), np.log(max(doses))
        ec50 = np.exp(extension_rng.uniform(*ends, n_perturbations))
        slope = 1.5 * np.exp(0.2 * extension_rng.standard_normal(n_perturbations))
        truth |= {"ec50": ec50, "slope": slope}
        dose = extension_rng.choice(doses, members.shape)
        h, half = np.append(slope, 1.0)[members], np.append(ec50, 1.0)[members]
        response = dose**h / (dose**h + half**h)
        parts *= response[:, :, None]
        of_pair = of_pair * response.prod(axis=1, keepdims=True)
    shift = parts.sum(axis=1) + of_pair

    chunks = []
    for start in range(0, n_cells, CELLS_PER_CHUNK):
        rows = slice(start, start + CELLS_PER_CHUNK)
        projected = (basal[rows] + shift[rows]) @ w_in
        logits = (np.tanh(projected) + 0.2 * projected) @ w_out
        logits += intercept + batch_shift[batch[rows]]
        # A Poisson with a gamma rate is the negative binomial.
        rate = scaled_rates(logits, library[rows]) / inverse_dispersion
        rate = cell_rng.gamma(inverse_dispersion, rate)
        chunks.append(sp.csr_matrix(cell_rng.poisson(rate).astype(np.float32)))
    counts = sp.vstack(chunks, format="csr")
    adata = annotated(counts, names, (first, second), condition, {"true_basal": basal}, truth)
    if doses:
        pairs = zip(dose, members < n_perturbations, strict=True)
        adata.obs["dose"] = ["+".join(str(float(d)) for d in own[kept]) for own, kept in pairs]
    replicates = numbered_names("replicate_", n_batches)
    adata.obs["replicate"] = pd.Categorical.from_codes(batch, replicates)
    if n_contexts > 1:
        contexts = numbered_names("context_", n_contexts)
        adata.obs["context"] = pd.Categorical.from_codes(context, contexts)
    adata.obs["total_counts"] = np.asarray(counts.sum(axis=1)).ravel()
    return adata


def benchmark_screen(variant: str = "default", seed: int = 0) -> ad.AnnData:
    """Simulate one of the four screens on which the recovery of masks is reported.

    Parameters
    ----------
    variant
        One of the following:

        * ``"default"``: 20,000 cells, 1,000 genes, 200 perturbations and 60 pairs of them,
          20 latents, masks of density 0.1, effects of 2 standard deviations of the basal state,
          about 8,000 counts a cell, one batch.
        * ``"weak"``: effects half as large.
        * ``"shallow"``: about 1,500 counts a cell, effects of 1.5.
        * ``"small"``: 6,000 cells, 500 genes, 60 perturbations and 20 pairs, 10 latents, masks
          of density 0.2.
    seed
        Seed of all randomness.

    Returns
    -------
    anndata.AnnData
        As of :func:`simulated_screen`.

    Raises
    ------
    ScreenError
        If ``variant`` is none of the four.

    Examples
    --------
    >>> import scvi_sams
    >>> scvi_sams.datasets.benchmark_screen("small", seed=1).shape
    (6000, 500)
    """
    if variant not in _VARIANTS:
        raise ScreenError(
            f"There is no benchmark screen {variant!r}: `variant` is one of "
            f"{', '.join(map(repr, _VARIANTS))}."
        )
    return simulated_screen(**_VARIANTS[variant], seed=seed)


def _draw_contexts(
    rng: Generator,
    effect: NDArray[np.float64],
    n_contexts: int,
    fraction: float,
    spread: float,
    effect_size: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Differences of effects (perturbations x contexts x latents), and mean basal states."""
    n_perturbations, n_latent = effect.shape
    centres = spread * rng.standard_normal((n_contexts, n_latent))
    difference = np.zeros((n_perturbations, n_contexts, n_latent))
    for row in rng.permutation(n_perturbations)[: round(fraction * n_perturbations)]:
        context, kind = rng.integers(n_contexts), rng.integers(3)
        moved, still = np.flatnonzero(effect[row]), np.flatnonzero(effect[row] == 0)
        if len(still) and (kind == 0 or not len(moved)):
            difference[row, context, rng.choice(still)] = effect_size * rng.choice([-1.0, 1.0])
        else:
            latent = rng.choice(moved)
            difference[row, context, latent] = -max(int(kind), 1) * effect[row, latent]
    return difference, centres
