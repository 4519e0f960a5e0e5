"""Pairs of perturbations against the sum of their parts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Literal, TypeAlias

import anndata as ad
import numpy as np
import pandas as pd
import torch
from scipy import sparse
from scvi.utils import track

from scvi_sams._constants import SAMS_REGISTRY_KEYS
from scvi_sams._exceptions import ScreenError
from scvi_sams.data import unknown_perturbations
from scvi_sams.interpretation import (
    PAIR_CLASSES,
    PairThresholds,
    pair_summary,
    summarize_effects,
)
from scvi_sams.mechanisms import null_perturbations
from scvi_sams.model._counterfactual_mixin import CounterfactualMixin

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from anndata import AnnData

__all__ = ["Pairs", "PairsMixin"]

Pairs: TypeAlias = "Sequence[str | tuple[str, str] | Mapping[str, float]]"
"""Pairs as labels (``"A+B"``), two names, or two doses (``{"A": 1.0, "B": 0.5}``)."""

_THRESHOLDS = PairThresholds()


class PairsMixin(CounterfactualMixin):
    """Interactions of perturbations, measured or not."""

    @torch.inference_mode()
    def get_pair_interactions(
        self,
        pairs: Pairs,
        n_samples: int = 50,
        n_cells: int = 200,
        credible_level: float = 0.95,
        thresholds: PairThresholds = _THRESHOLDS,
        basal: Literal["prior", "control"] | AnnData | Sequence[int] = "prior",
        batch: str | None = None,
        *,
        seed: int = 0,
    ) -> AnnData:
        r"""Effects of pairs beyond the sum of the effects of their parts.

        .. math:: \varepsilon_{AB} = \delta_{AB} - \delta_A - \delta_B

        with all effects on the same basal states and from the same draw of masks and effects, on
        the scale of :meth:`get_average_treatment_effect`. Shifts add up in latent space. A pair
        therefore departs from additivity by the curvature of the decoder alone, unless the model
        was made with ``interactions=True``, when a measured pair has a shift of its own too; one
        that was not measured still has none.

        The intervals hold what is uncertain about masks and effects, with the decoder taken as
        known, and are far too narrow for a deviation that the decoder makes: on a simulated
        screen, intervals of 95% held the true deviation of 16% of the genes, and the true score
        of 20% of the pairs. Scores and their order were right there (correlation 0.97). Compare
        fits from several seeds to see what the decoder leaves open.

        Parameters
        ----------
        pairs
            Labels (``"A+B"``), two names each, or two doses each; measured or not.
        n_samples
            Draws of masks and effects, two at least.
        n_cells
            Cells of the population. Ignored if ``basal`` is cells.
        credible_level
            Level of the intervals.
        thresholds
            Where the kinds of interaction end.
        basal, batch
            Where basal states come from, and the batch, as in :meth:`predict`.
        seed
            Seed of the population and of the draws.

        Returns
        -------
        AnnData, pairs x genes, with the posterior mean of :math:`\varepsilon` in ``X``.
        ``layers``: ``lower``, ``upper`` and ``std`` of it, ``effect`` (of the pair) and
        ``additive`` (sum of the parts), both posterior means. ``obs``: ``first``, ``second``,
        ``measured`` (whether cells of the model's AnnData have both; missing without it) and the
        columns of :func:`~scvi_sams.interpretation.pair_summary`, among them
        ``interaction_score`` with its interval, ``class`` and ``class_probability``; see
        :func:`~scvi_sams.interpretation.classify_pairs` for what the kinds are.

        Raises
        ------
        NotImplementedError
            If perturbations do not act by a shift, and have no posterior (ConditionalVAE), or
            every combination is a perturbation of its own (SVAEPlus by default).
        UnknownPerturbationError
            If a pair names a perturbation that the model has not seen.
        ScreenError
            If what is given as a pair is not two perturbations, or an argument cannot be used.
        ValueError
            If ``credible_level`` is not between 0 and 1.

        Examples
        --------
        >>> found = model.get_pair_interactions(["KLF1+CEBPA"])  # doctest: +SKIP
        >>> found.obs[["interaction_score", "class", "class_probability"]]  # doctest: +SKIP
        >>> found.to_df().loc["KLF1+CEBPA"].nlargest(10)  # doctest: +SKIP
        """
        self._require_pairs("get_pair_interactions")
        dosage, labels = self._parse_pairs(pairs)
        rows: list[dict[str, float | str]] = []
        columns: dict[str, list[np.ndarray]] = {
            name: [] for name in ("mean", "lower", "upper", "std", "effect", "additive")
        }
        for first, second, pair in self._pair_draws(
            dosage, n_samples, n_cells, credible_level, basal, batch, seed
        ):
            rows.append(pair_summary(first, second, pair, credible_level, thresholds))
            summary = summarize_effects(pair - first - second, credible_level)
            for name in ("mean", "lower", "upper", "std"):
                columns[name].append(getattr(summary, name))
            columns["effect"].append(pair.mean(0))
            columns["additive"].append((first + second).mean(0))
        layers = {name: np.stack(values).astype(np.float32) for name, values in columns.items()}
        found = ad.AnnData(
            layers.pop("mean"),
            obs=self._pair_obs(dosage, labels, rows),
            var=pd.DataFrame(index=pd.Index(self.get_var_names())),
            layers=layers,
        )
        found.uns["scvi_sams"] = self._provenance() | {
            "seed": seed,
            "credible_level": credible_level,
            "units": self._expression_units,
            "thresholds": thresholds._asdict(),
        }
        return found

    @torch.inference_mode()
    def rank_unmeasured_pairs(
        self,
        perturbations: Sequence[str] | None = None,
        n_pairs: int | None = None,
        n_samples: int = 10,
        n_cells: int = 50,
        credible_level: float = 0.95,
        thresholds: PairThresholds = _THRESHOLDS,
        basal: Literal["prior", "control"] | AnnData | Sequence[int] = "prior",
        batch: str | None = None,
        *,
        seed: int = 0,
    ) -> pd.DataFrame:
        r"""Pairs that nobody measured, the most surprising first.

        Ranked by the error to expect of adding up the effects of the parts, which is what is
        expected to be non-additive and what is unknown of it,
        :math:`\mathrm E|\varepsilon|^2 = |\mathrm E\varepsilon|^2
        + \operatorname{tr}\operatorname{Cov}\varepsilon`
        (:func:`~scvi_sams.interpretation.expected_surprise`). As shifts add up in latent space,
        this is the curvature of the decoder at work: saturation of shared latents, and strong
        effects that meet in the same genes. Epistasis that no latent state of a measured cell
        shows is beyond it, whether or not the model has ``interactions``. The decoder is taken as
        known, so that ``uncertainty`` is that of masks and effects alone.

        Parameters
        ----------
        perturbations
            Perturbations to pair; all by default, but for null perturbations made of controls.
        n_pairs
            Number of pairs to return; all by default.
        n_samples, n_cells
            Draws and cells, as in :meth:`get_pair_interactions`; the time is proportional to
            both, and to the square of the number of perturbations.
        credible_level, thresholds, basal, batch, seed
            As in :meth:`get_pair_interactions`.

        Returns
        -------
        A row a pair, by falling ``surprise``: ``first``, ``second``, and the columns of
        :func:`~scvi_sams.interpretation.pair_summary`.

        Raises
        ------
        NotImplementedError
            If perturbations do not act by a shift, and have no posterior (ConditionalVAE), or
            every combination is a perturbation of its own (SVAEPlus by default).
        UnknownPerturbationError
            If ``perturbations`` names one that the model has not seen.
        ScreenError
            If the model was loaded without its AnnData, every pair was measured, or an argument
            cannot be used.
        ValueError
            If ``credible_level`` is not between 0 and 1.

        Examples
        --------
        >>> model.rank_unmeasured_pairs(n_pairs=20)  # doctest: +SKIP
        """
        self._require_pairs("rank_unmeasured_pairs")
        names = self.perturbation_names
        nulls = set(null_perturbations(names))
        chosen = [n for n in names if n not in nulls] if perturbations is None else perturbations
        if unknown := [name for name in chosen if name not in names]:
            raise unknown_perturbations(unknown, names)
        if n_pairs is not None and n_pairs < 1:
            raise ScreenError(f"n_pairs={n_pairs}: at least one is needed.")
        measured = self._measured_pairs()
        if measured is None:
            raise ScreenError(
                "Which pairs were measured is in the AnnData, and the model was loaded without "
                "it: load it with its AnnData, or ask get_pair_interactions() for given pairs."
            )
        candidates = [
            (names[a], names[b])
            for a, b in combinations(sorted({names.index(name) for name in chosen}), 2)
            if (a, b) not in measured
        ]
        if not candidates:
            raise ScreenError(
                f"No pair of these {len(chosen)} perturbations is unmeasured: name more of them."
            )
        dosage, labels = self._parse_pairs(candidates)
        drawn = self._pair_draws(dosage, n_samples, n_cells, credible_level, basal, batch, seed)
        rows = [pair_summary(*effects, credible_level, thresholds) for effects in drawn]
        table = self._pair_obs(dosage, labels, rows).drop(columns="measured")
        table = table.sort_values("surprise", ascending=False, kind="stable").iloc[:n_pairs]
        table.attrs = self._provenance() | {"seed": seed, "units": self._expression_units}
        return table

    # -- shared steps --------------------------------------------------------------------------

    def _require_pairs(self, method: str) -> None:
        """Raise if effects of pairs are not made from those of their parts."""
        self._require_effects(method)
        if self.registry["setup_args"].get("combinations") == "own":
            raise NotImplementedError(
                f"{method}: in this {type(self).__name__} every combination is a perturbation of "
                "its own, which says nothing of pairs that were not measured; set up with "
                "combinations='additive'. For measured pairs see get_average_treatment_effect() "
                "and scvi_sams.interpretation.classify_pairs()."
            )

    def _parse_pairs(self, pairs: Pairs) -> tuple[sparse.csr_matrix, list[str]]:
        """Doses of pairs (pairs x perturbations), and their labels."""
        if isinstance(pairs, str) or not isinstance(pairs, Sequence):
            raise ScreenError(f"pairs={pairs!r}: give a list of pairs, such as ['A+B'].")
        written = [dict.fromkeys(pair, 1.0) if isinstance(pair, tuple) else pair for pair in pairs]
        dosage, labels = self._parse_distinct_conditions(written)
        dosage.eliminate_zeros()
        dosage.sort_indices()
        for label, number in zip(labels, np.diff(dosage.indptr), strict=True):
            if number != 2:
                raise ScreenError(
                    f"{label!r} is {number} perturbation{'' if number == 1 else 's'}, not a pair."
                )
        return dosage, labels

    def _pair_draws(
        self,
        dosage: sparse.csr_matrix,
        n_samples: int,
        n_cells: int,
        credible_level: float,
        basal: Literal["prior", "control"] | AnnData | Sequence[int],
        batch: str | None,
        seed: int,
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Draws of the effects of both parts and of each pair, draws x genes each."""
        if n_samples < 2:
            raise ScreenError(f"n_samples={n_samples}: at least two draws are needed.")
        # Refused before the work, not after it.
        summarize_effects(np.zeros((1, 1)), credible_level)
        # Each part at each of its doses once, however many pairs it is in.
        parts = pd.DataFrame({"column": dosage.indices, "dose": dosage.data})
        part_of = parts.groupby(["column", "dose"], sort=False).ngroup().to_numpy().reshape(-1, 2)
        single = parts.drop_duplicates()
        n_singles, n_names = len(single), len(self.perturbation_names)
        singles = sparse.csr_matrix(
            (single["dose"], (np.arange(n_singles), single["column"])), shape=(n_singles, n_names)
        )
        nothing = sparse.csr_matrix((1, n_names), dtype=dosage.dtype)
        used = sparse.vstack([nothing, singles, dosage], "csr")
        with self._seeded(seed):
            population, _ = self._population(basal, n_cells, batch, None)
            draws = self._sample_globals(n_samples, used)

        def effect(row: int) -> np.ndarray:
            means = self._population_means(population, used, row, draws)
            return np.asarray(means - against)

        against = self._population_means(population, used, 0, draws)
        of_part = [effect(1 + row) for row in range(n_singles)]
        n_pairs = dosage.shape[0]
        for row in track(range(n_pairs), description="Pairs", disable=n_pairs < 20):
            first, second = (of_part[part] for part in part_of[row])
            yield first, second, effect(1 + n_singles + row)

    def _pair_obs(
        self,
        dosage: sparse.csr_matrix,
        labels: list[str],
        rows: list[dict[str, float | str]],
    ) -> pd.DataFrame:
        names = np.asarray(self.perturbation_names, object)
        columns = dosage.indices.reshape(-1, 2)
        obs = pd.DataFrame(
            {"first": names[columns[:, 0]], "second": names[columns[:, 1]]},
            index=pd.Index(labels, name="pair"),
        )
        measured = self._measured_pairs()
        obs["measured"] = pd.array(
            [None if measured is None else (min(c), max(c)) in measured for c in columns.tolist()],
            dtype="boolean",
        )
        table = pd.DataFrame(rows, index=obs.index)
        table["class"] = pd.Categorical(table["class"], categories=PAIR_CLASSES)
        return obs.join(table)

    def _measured_pairs(self) -> set[tuple[int, int]] | None:
        """Pairs that cells have together, by their positions; ``None`` without the AnnData."""
        if self.adata is None:
            return None
        dosage = self.adata_manager.get_from_registry(SAMS_REGISTRY_KEYS.PERTURBATION_KEY)
        present = sparse.csr_matrix(dosage > 0).astype(np.float32)
        together = (present.T @ present).tocoo()
        return {(int(a), int(b)) for a, b in zip(together.row, together.col, strict=True) if a < b}
