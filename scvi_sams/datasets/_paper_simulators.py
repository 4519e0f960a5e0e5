"""The simulations on which SAMS-VAE and SVAE+ were introduced, from their papers' descriptions."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from scvi_sams._exceptions import ScreenError
from scvi_sams.datasets._simulation import (
    CELLS_PER_CHUNK,
    CONTROL,
    annotated,
    check_parameters,
    draw_conditions,
    draw_masks,
    draw_pairs,
    numbered_names,
    scaled_rates,
)
from scvi_sams.evaluation._splits import write_split

if TYPE_CHECKING:
    import anndata as ad
    from numpy.random import Generator
    from numpy.typing import NDArray

_NEGATIVE_SLOPE = 0.2  # of the leaky rectifier


def simulated_bereket_2023(
    n_cells: int = 10_000,
    n_features: int = 200,
    n_perturbations: int = 100,
    n_pairs: int = 0,
    n_latent: int = 15,
    *,
    mask_probability: float = 0.1,
    embedding_scale: float = 2.0,
    noise_share: float = 0.2,
    n_hidden: int = 64,
    n_hidden_layers: int = 1,
    control_fraction: float = 0.1,
    pair_fraction: float = 0.25,
    seed: int = 0,
) -> ad.AnnData:
    r"""Simulate from the generative model of SAMS-VAE, with Normal observations.

    .. math::

        m_{tl} &\sim \mathrm{Bernoulli}(\pi), \qquad e_{tl} \sim \mathcal N(0, \beta^2) \\
        z_i &= z^b_i + \textstyle\sum_t d_{it}\, m_t \odot e_t, \qquad
        z^b_i \sim \mathcal N(0, I) \\
        x_{ij} &\sim \mathcal N\bigl( f_j(z_i),\ \rho \bigr), \qquad
        \mathrm{Var}_i\, f_j(z_i) = 1 - \rho

    with a random network :math:`f`, so that a share :math:`\rho` of the variance of every feature
    is noise.

    Parameters
    ----------
    n_cells
        Cells, of every kind together.
    n_features
        Features that are observed.
    n_perturbations
        Perturbations, named ``"P001"``, ``"P002"`` and so on.
    n_pairs
        Distinct pairs of perturbations (``"P001+P014"``), with a share ``pair_fraction`` of cells.
    n_latent
        Latents that perturbations can move.
    mask_probability
        Probability :math:`\pi` that a perturbation moves a latent.
    embedding_scale
        Standard deviation :math:`\beta` of an effect, in those of the basal state.
    noise_share
        Share :math:`\rho` of the variance of a feature, over all cells, that is noise.
    n_hidden, n_hidden_layers
        Size of the random network, of leaky rectifiers.
    control_fraction
        Share of the cells without a perturbation.
    pair_fraction
        Share of the cells with a pair; unused without pairs. The other cells carry one
        perturbation each, drawn uniformly.
    seed
        Seed of all randomness.

    Returns
    -------
    anndata.AnnData
        Cells x features with real numbers (float32) in ``X``:

        * ``obs["perturbation"]``: ``"control"``, ``"P001"`` or ``"P001+P014"``
        * ``obsm["true_basal"]``, ``obsm["true_latent"]``: :math:`z^b` and :math:`z`, cells x
          latents
        * ``uns["truth"]``: ``"mask"``, ``"embedding"`` and ``"effect"`` (their product), each
          perturbations x latents, with ``"perturbation_names"``, ``"seed"`` and ``"parameters"``

        The features are no counts: models need ``setup_anndata(..., is_count_data=False)`` and
        ``gene_likelihood="normal"``.

    Raises
    ------
    ScreenError
        If an argument is out of its range.

    Notes
    -----
    From Bereket and Karaletsos (NeurIPS 2023): sparse additive effects, Normal observations about
    a random non-linear decoder, a stated share of noise. Ours are the number of each thing, the
    network, the default of every argument, the control cells, and that a mask that comes out
    empty is given one latent.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_bereket_2023(n_cells=2_000)
    >>> scvi_sams.SAMSVAE.setup_anndata(
    ...     adata, perturbation_key="perturbation", control="control", is_count_data=False
    ... )
    >>> model = scvi_sams.SAMSVAE(adata, gene_likelihood="normal")
    """
    parameters = check_parameters(locals())  # first, while arguments are the only local names
    truth_rng, cell_rng = np.random.default_rng(seed).spawn(2)

    mask = draw_masks(truth_rng, n_perturbations, n_latent, mask_probability, inactive=0.0)
    embedding = embedding_scale * truth_rng.standard_normal(mask.shape)
    effect = mask * embedding
    first, second = draw_pairs(truth_rng, n_perturbations, n_pairs)
    network = _draw_network(truth_rng, n_latent, *[n_hidden] * n_hidden_layers, n_features)

    names = numbered_names("P", n_perturbations, min_width=3)
    shift = np.vstack([np.zeros((1, n_latent)), effect, effect[first] + effect[second]])
    condition = draw_conditions(
        cell_rng, n_cells, n_perturbations, n_pairs, control_fraction, pair_fraction
    )
    basal = cell_rng.standard_normal((n_cells, n_latent))
    latent = basal + shift[condition]
    signal = _decode(latent, network)
    signal -= signal.mean(axis=0)
    signal *= np.sqrt(1 - noise_share) / np.maximum(signal.std(axis=0), np.finfo(float).tiny)
    features = signal + np.sqrt(noise_share) * cell_rng.standard_normal(signal.shape)
    truth = {"mask": mask, "embedding": embedding, "effect": effect}
    return annotated(
        features.astype(np.float32),
        names,
        (first, second),
        condition,
        {"true_basal": basal, "true_latent": latent},
        truth | {"seed": seed, "parameters": parameters},
    )


def simulated_lopez_2023(
    n_cells: int = 20_000,
    n_genes: int = 200,
    n_perturbations: int = 100,
    n_latent: int = 15,
    *,
    max_targets: int = 3,
    shift_size: float = 5.0,
    n_held_out: int = 20,
    library_size: float = 5_000.0,
    n_hidden: int = 64,
    n_hidden_layers: int = 1,
    control_fraction: float = 0.1,
    seed: int = 0,
) -> ad.AnnData:
    r"""Simulate from the generative model of SVAE+, with Poisson counts.

    Intervention :math:`k` moves the prior mean of one to three latents:

    .. math::

        z_i \sim \mathcal N(m_{k_i} \odot \mu_{k_i},\ I), \qquad \mu_{kl} = \pm 5, \qquad
        x_{ig} \sim \mathrm{Poisson}\bigl( l\, \mathrm{softmax}_g f(z_i) \bigr)

    with a random network :math:`f`. The last interventions are held out, for a model that was
    trained on the others to learn.

    Parameters
    ----------
    n_cells
        Cells, of every kind together.
    n_genes
        Genes.
    n_perturbations
        Interventions, named ``"P001"``, ``"P002"`` and so on; one a cell.
    n_latent
        Latents.
    max_targets
        An intervention targets from one to this many latents, each number as likely.
    shift_size
        Size of a shift, in standard deviations of a latent.
    n_held_out
        How many interventions, the last ones, are for transfer.
    library_size
        Expected counts of every cell.
    n_hidden, n_hidden_layers
        Size of the random network, of leaky rectifiers.
    control_fraction
        Share of the cells without an intervention.
    seed
        Seed of all randomness.

    Returns
    -------
    anndata.AnnData
        Cells x genes with counts (CSR, float32) in ``X`` and ``layers["counts"]``:

        * ``obs["perturbation"]``: ``"control"`` or ``"P001"``
        * ``obs["split"]``: ``"test"`` for cells of the interventions held out, else ``"train"``,
          as if written by :func:`scvi_sams.evaluation.split_perturbations`
        * ``obsm["true_basal"]``: the state less the shift, cells x latents
        * ``obsm["true_latent"]``: the state :math:`z`, cells x latents
        * ``uns["truth"]``: as of :func:`simulated_bereket_2023`

    Raises
    ------
    ScreenError
        If an argument is out of its range.

    Notes
    -----
    From Lopez, Tagasovska et al. (CLeaR 2023): 100 interventions, 15 latents, one to three targets
    of each, shifts of size 5, Poisson counts, and the last 20 interventions for transfer. Ours
    are the random sign of a shift, the network, the softmax and constant library size, the control
    cells, and the numbers of cells and genes.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_lopez_2023(n_cells=2_000)
    >>> adata.obs.loc[adata.obs["split"] == "test", "perturbation"].nunique()
    20
    """
    parameters = check_parameters(locals())  # first, while arguments are the only local names
    if max_targets > n_latent:
        raise ScreenError(f"`max_targets` is {max_targets}, but there are {n_latent} latents.")
    if n_held_out >= n_perturbations:
        raise ScreenError(
            f"`n_held_out` is {n_held_out} of {n_perturbations} interventions: leave some to "
            "train on."
        )
    truth_rng, cell_rng = np.random.default_rng(seed).spawn(2)

    n_targets = truth_rng.integers(1, max_targets, size=n_perturbations, endpoint=True)
    rank = truth_rng.random((n_perturbations, n_latent)).argsort(axis=1).argsort(axis=1)
    mask = rank < n_targets[:, None]
    embedding = shift_size * truth_rng.choice([-1.0, 1.0], mask.shape)
    effect = mask * embedding
    network = _draw_network(truth_rng, n_latent, *[n_hidden] * n_hidden_layers, n_genes)

    names = numbered_names("P", n_perturbations, min_width=3)
    condition = draw_conditions(cell_rng, n_cells, n_perturbations, 0, control_fraction, 0.0)
    basal = cell_rng.standard_normal((n_cells, n_latent))
    latent = basal + np.vstack([np.zeros((1, n_latent)), effect])[condition]
    chunks = []
    for start in range(0, n_cells, CELLS_PER_CHUNK):
        logits = _decode(latent[start : start + CELLS_PER_CHUNK], network)
        rate = scaled_rates(logits, library_size)
        chunks.append(sp.csr_matrix(cell_rng.poisson(rate).astype(np.float32)))
    truth = {"mask": mask, "embedding": embedding, "effect": effect}
    adata = annotated(
        sp.vstack(chunks, format="csr"),
        names,
        (np.arange(0), np.arange(0)),
        condition,
        {"true_basal": basal, "true_latent": latent},
        truth | {"seed": seed, "parameters": parameters},
    )
    is_held_out = condition > n_perturbations - n_held_out
    write_split(
        adata,
        np.where(is_held_out, "test", "train").astype(object),
        "split",
        kind="simulated_lopez_2023",
        seed=seed,
        arguments={
            "perturbation_key": "perturbation",
            "control": CONTROL,
            "n_held_out": n_held_out,
        },
        held_out_by="perturbation",
        held_out=names[n_perturbations - n_held_out :],
    )
    return adata


def _draw_network(rng: Generator, *sizes: int) -> list[NDArray[np.float64]]:
    """Weights of a random network whose layers keep the scale of their input."""
    return [rng.standard_normal((n, m)) / np.sqrt(n) for n, m in pairwise(sizes)]


def _decode(
    latent: NDArray[np.float64], network: list[NDArray[np.float64]]
) -> NDArray[np.float64]:
    """Output of the network (cells x features), linear in its last layer."""
    *hidden, last = network
    for weights in hidden:
        latent = latent @ weights
        latent = np.where(latent > 0, latent, _NEGATIVE_SLOPE * latent)
    return latent @ last
