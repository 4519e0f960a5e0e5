"""Genetic interactions: what a combination does beyond the sum of its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.stats import false_discovery_control, norm

from scvi_sams._exceptions import ScreenError
from scvi_sams.data.conditions import split_label
from scvi_sams.data.tables import (
    aligned_profiles,
    profile_frame,
    ratio,
    row_correlation,
    standard_error_frames,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from scvi_sams.data.tables import ProfileTable

__all__ = ["InteractionAgreement", "interaction_agreement", "interaction_residuals"]


# Sums of effects in single precision: a residual below this share of them is rounding.
_ROUNDING = 1e-6


class InteractionAgreement(NamedTuple):
    """Agreement of predicted and observed interactions; see :func:`interaction_agreement`."""

    correlation: float
    """Pearson correlation of the residuals over all combinations and genes."""
    recall: float
    """Share of the observed interactions among the predicted ones, with the same sign."""
    precision: float
    """Share of the predicted interactions that were observed, with the same sign."""
    n_observed: int
    """Observed interactions: residuals that pass the false discovery rate."""
    n_predicted: int
    """Predicted interactions: the strongest predicted residuals."""
    by_combination: pd.DataFrame
    """The same, by combination: ``correlation``, ``recall``, ``precision``, ``n_observed``,
    ``n_predicted``."""


def interaction_residuals(
    effects: ProfileTable,
    combinations: Sequence[str] | None = None,
    combination_delimiter: str = "+",
) -> ad.AnnData:
    r"""Effect of combinations less the sum of the effects of their parts.

    .. math:: \varepsilon_{AB} = \Delta_{AB} - \Delta_A - \Delta_B

    and likewise for more parts.

    Parameters
    ----------
    effects
        Conditions x genes, effects against the controls, with the parts of each combination.
    combinations
        Combinations wanted; by default all whose parts are in ``effects`` too.
    combination_delimiter
        What joins the parts of a combination.

    Returns
    -------
    AnnData, combinations x genes, residuals in ``X``, in the units of ``effects``. Where
    ``effects`` has ``layers["standard_error"]`` and ``var["control_standard_error"]``, as from
    :func:`observed_average_treatment_effect`, ``layers["standard_error"]`` holds
    :math:`\sqrt{\sigma_{AB}^2 + \sigma_A^2 + \sigma_B^2 + \sigma_0^2}`, with :math:`\sigma` the
    standard errors of the means of the cells: the controls enter once, not three times.

    Raises
    ------
    ScreenError
        If no combination is in ``effects`` with all its parts, or one asked for is not.

    Notes
    -----
    The residual of Ahlmann-Eltze, Huber and Anders (Nature Methods 2025) and of Norman et al.
    (Science 2019). Additive latents predict interactions only through the curvature of the
    decoder.

    Examples
    --------
    >>> import pandas as pd
    >>> from scvi_sams.evaluation import interaction_residuals
    >>> effects = pd.DataFrame({"GATA1": [1.0, 2.0, 3.5]}, index=["A", "B", "A+B"])
    >>> interaction_residuals(effects).to_df()
         GATA1
    A+B    0.5
    """
    frame = profile_frame(effects, "effects")
    names, coefficients = _contrasts(frame.index, combinations, combination_delimiter)
    values = frame.to_numpy()
    residuals = coefficients @ values
    residuals[np.abs(residuals) <= _ROUNDING * (abs(coefficients) @ np.abs(values))] = 0
    layers = {}
    if isinstance(effects, ad.AnnData) and "standard_error" in effects.layers:
        squared = profile_frame(effects, "effects", layer="standard_error").to_numpy() ** 2
        control = np.zeros(frame.shape[1])
        if "control_standard_error" in effects.var:
            control = effects.var["control_standard_error"].to_numpy(dtype=np.float64) ** 2
        shared = np.asarray(coefficients.sum(axis=1)) ** 2 * control
        own = np.maximum(squared - control, 0)
        layers["standard_error"] = np.sqrt(coefficients.power(2) @ own + shared)
    return ad.AnnData(
        residuals,
        obs=pd.DataFrame(index=names),
        var=pd.DataFrame(index=frame.columns.copy()),
        layers=layers,
    )


def interaction_agreement(
    predicted: ProfileTable,
    observed: ProfileTable,
    fdr: float = 0.05,
    n_predicted: int | None = None,
) -> InteractionAgreement:
    r"""Agreement of predicted with observed interactions, and how many of them are found.

    Observed interactions are the residuals :math:`\varepsilon_{cg}` (a combination and a gene
    each) that differ from 0 by a two-sided Normal test of
    :math:`\varepsilon_{cg} / \sigma_{cg}`, at a false discovery rate over all combinations and
    genes (Benjamini and Hochberg). Predicted interactions are the residuals that are largest in
    absolute value. One is found if it is among both, with the same sign.

    Parameters
    ----------
    predicted
        Combinations x genes, predicted residuals, from :func:`interaction_residuals`.
    observed
        Combinations x genes, observed residuals, with ``layers["standard_error"]`` and every
        combination and gene of ``predicted``.
    fdr
        False discovery rate of the observed interactions.
    n_predicted
        Number of predicted interactions; by default the number of observed ones, so that recall
        and precision are the same unless fewer residuals than that are not 0. A residual of 0 is
        never one: the additive model predicts none.

    Returns
    -------
    Correlation, recall, precision and numbers, over all and by combination. NaN where a
    denominator is 0.

    Raises
    ------
    ScreenError
        If the tables do not match, or standard errors are missing.
    ValueError
        If ``fdr`` is not between 0 and 1, or ``n_predicted`` is negative.

    Notes
    -----
    After the comparison in Ahlmann-Eltze, Huber and Anders (Nature Methods 2025), who call
    interactions by a local false discovery rate of 5%. The Normal test needs some ten cells of
    each condition; with fewer it calls too much.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulated_screen(n_cells=1_000)
    >>> effect = scvi_sams.evaluation.observed_average_treatment_effect(
    ...     adata, perturbation_key="perturbation", control="control", min_cells=2
    ... )
    >>> residuals = scvi_sams.evaluation.interaction_residuals(effect)
    >>> agreement = scvi_sams.evaluation.interaction_agreement(residuals, residuals)
    >>> round(agreement.correlation, 6)
    1.0
    """
    if not 0 < fdr < 1:
        raise ValueError(f"fdr={fdr!r} must be between 0 and 1.")
    if n_predicted is not None and n_predicted < 0:
        raise ValueError(f"n_predicted={n_predicted} must be 0 or more.")
    guess_frame, truth_frame = aligned_profiles(predicted, observed)
    errors, _ = standard_error_frames(observed, "standard_error", truth_frame)
    guess, truth = guess_frame.to_numpy(), truth_frame.to_numpy()
    called = _significant(truth, errors.to_numpy(), fdr)
    top = _largest(np.abs(guess), int(called.sum()) if n_predicted is None else n_predicted)
    found = called & top & (np.sign(guess) == np.sign(truth))

    def share(part: NDArray[np.bool_], whole: NDArray[np.bool_]) -> NDArray[np.float64]:
        return ratio(part.sum(axis=1).astype(float), whole.sum(axis=1).astype(float))

    by_combination = pd.DataFrame(
        {
            "correlation": row_correlation(guess, truth),
            "recall": share(found, called),
            "precision": share(found, top),
            "n_observed": called.sum(axis=1),
            "n_predicted": top.sum(axis=1),
        },
        index=guess_frame.index.copy(),
    )
    flat = [each.reshape(1, -1) for each in (found, called, top)]
    return InteractionAgreement(
        correlation=float(row_correlation(guess.reshape(1, -1), truth.reshape(1, -1))[0]),
        recall=float(share(flat[0], flat[1])[0]),
        precision=float(share(flat[0], flat[2])[0]),
        n_observed=int(called.sum()),
        n_predicted=int(top.sum()),
        by_combination=by_combination,
    )


def _contrasts(
    conditions: pd.Index, combinations: Sequence[str] | None, delimiter: str
) -> tuple[pd.Index, sp.csr_matrix]:
    """1 for each combination and -1 for each of its parts, combinations x conditions."""
    parts = {name: split_label(str(name), delimiter) for name in conditions}
    if combinations is None:
        wanted = [
            name
            for name, of_name in parts.items()
            if len(of_name) > 1 and set(of_name) <= parts.keys()
        ]
        if not wanted:
            raise ScreenError(
                f"No condition of `effects` joins parts by {delimiter!r} that are all among its "
                f"conditions: add the single perturbations."
            )
    else:
        wanted = list(combinations)
        for name in wanted:
            of_name = split_label(str(name), delimiter)
            if len(of_name) < 2:
                raise ScreenError(f"{name!r} is no combination joined by {delimiter!r}.")
            if lacking := [part for part in [name, *of_name] if part not in parts]:
                raise ScreenError(f"{name!r} needs {lacking[0]!r}, which is not in `effects`.")
    entries: dict[tuple[int, int], float] = {}
    for row, name in enumerate(wanted):
        entries[row, conditions.get_loc(name)] = 1.0
        for part in split_label(str(name), delimiter):
            cell = (row, conditions.get_loc(part))
            entries[cell] = entries.get(cell, 0.0) - 1.0
    rows, columns = zip(*entries, strict=True)
    shape = (len(wanted), len(conditions))
    return pd.Index(wanted), sp.csr_matrix((list(entries.values()), (rows, columns)), shape=shape)


def _significant(
    residuals: NDArray[np.float64], errors: NDArray[np.float64], fdr: float
) -> NDArray[np.bool_]:
    z = np.divide(residuals, errors, out=np.zeros_like(residuals), where=errors > 0)
    p_values = 2 * norm.sf(np.abs(z))
    return false_discovery_control(p_values.ravel()).reshape(p_values.shape) <= fdr


def _largest(strength: NDArray[np.float64], number: int) -> NDArray[np.bool_]:
    """Mark the largest entries that are not 0; of equal ones those that come first."""
    order = np.argsort(-strength, axis=None, kind="stable")[:number]
    largest = np.zeros(strength.size, dtype=bool)
    largest[order] = True
    return largest.reshape(strength.shape) & (strength > 0)
