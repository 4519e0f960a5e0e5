"""A normal prior of effects that alike perturbations share, in closed form."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.special import logsumexp, softmax
from scipy.stats import norm

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray


_LENGTHS = (1.0, 0.3, 0.1)  # in cosine distance: from nearly linear to the closest alone
_LEAST_RATIO, _MOST_RATIO = 1e-2, 1e6  # of a gene's variance of effects to that of their errors
_N_RATIOS = 24  # a factor of two from one to the next, as far as ratios of a screen reach
_MAX_ELEMENTS = 20_000_000  # of one array of ratios x perturbations x genes


class Similarity(NamedTuple):
    """How alike perturbations are, one kernel.

    Attributes
    ----------
    name
        Of the kernel.
    among
        Of the measured ones, positive semi-definite, measured x measured.
    to_measured
        Of new ones to the measured, new x measured.
    own
        Of new ones to themselves, by new one.
    """

    name: str
    among: NDArray[np.float64]
    to_measured: NDArray[np.float64]
    own: NDArray[np.float64]


class Noise(NamedTuple):
    """Variances of errors, the product of one by perturbation (mean 1) and one by gene."""

    of_perturbation: NDArray[np.float64]
    of_gene: NDArray[np.float64]

    @classmethod
    def from_variances(cls, variance: NDArray[np.float64]) -> Noise:
        """The product with the margins of a table, perturbations x genes."""
        of_perturbation = variance.mean(1) / variance.mean()
        of_gene = variance.mean(0)
        # No error is so small that others are nothing beside it.
        return cls(np.maximum(of_perturbation, 1e-3), np.maximum(of_gene, 1e-6 * variance.mean()))


class Moments(NamedTuple):
    """Mean and variance of effects, perturbations x genes."""

    mean: NDArray[np.float64]
    variance: NDArray[np.float64]


def similarities(features: NDArray[np.float64], n_measured: int) -> Iterator[Similarity]:
    """Kernels of features (perturbations x features), whose first rows are of the measured ones.

    Features are centred on the measured. Scalar products know how long a row is, cosines do not:
    in these, a row in the centre is like no other.
    """
    centred = features - features[:n_measured].mean(0)
    length = np.linalg.norm(centred, axis=1)
    scale = np.sqrt(np.mean(length[:n_measured] ** 2))
    known = length > 1e-9 * scale
    unit = centred / np.where(known, length, 1.0)[:, None] * known[:, None]
    product = (centred / scale) @ (centred[:n_measured] / scale).T
    cosine = np.clip(unit @ unit[:n_measured].T, -1.0, 1.0)
    np.fill_diagonal(cosine, 1.0)
    ones = np.ones(len(features) - n_measured)
    yield Similarity(
        "scalar product",
        product[:n_measured],
        product[n_measured:],
        (length / scale)[n_measured:] ** 2,
    )
    yield Similarity("cosine", cosine[:n_measured], cosine[n_measured:], ones)
    for width in _LENGTHS:
        near = np.exp((cosine - 1) / width)
        name = f"exponential of cosine / {width:g}"
        yield Similarity(name, near[:n_measured], near[n_measured:], ones)


def variance_ratios(effect: NDArray[np.float64], noise: Noise) -> NDArray[np.float64]:
    """Ratios of the variance of effects to that of their errors that genes may have."""
    largest = float((effect.var(0) / noise.of_gene).max(initial=0.0))
    most = np.clip(2 * largest, 10 * _LEAST_RATIO, _MOST_RATIO)
    return np.concatenate([[0.0], np.geomspace(_LEAST_RATIO, most, _N_RATIOS)])


class EffectPrior:
    r"""Effects of measured perturbations, and what follows from them for others.

    .. math::
        y_{pg} = \mu_g + f_{pg} + \epsilon_{pg}, \qquad
        f_{\cdot g} \sim \mathrm{Normal}(0, r_g d_g (\lambda K + (1 - \lambda) I)), \qquad
        \epsilon_{pg} \sim \mathrm{Normal}(0, c_p d_g)

    with a flat prior of :math:`\mu_g`, integrated out (restricted likelihood), and :math:`r_g` on
    a grid whose weights all genes share: the weights of maximal likelihood (EM). One
    eigendecomposition serves all genes and ratios.

    Parameters
    ----------
    effect
        Effects :math:`y`, measured perturbations x genes.
    noise
        Variances :math:`c` and :math:`d` of their errors.
    similarity
        Kernel :math:`K`.
    share
        Share :math:`\lambda` of the variance that alike perturbations have in common.
    ratios
        Grid of :math:`r`.
    """

    def __init__(
        self,
        effect: NDArray[np.float64],
        noise: Noise,
        similarity: Similarity,
        share: float,
        ratios: NDArray[np.float64],
    ) -> None:
        self.effect, self.noise, self.similarity = effect, noise, similarity
        self.share, self.ratios = share, ratios
        whitening = noise.of_perturbation**-0.5
        covariance = share * similarity.among + (1 - share) * np.eye(len(effect))
        values, vectors = np.linalg.eigh(whitening[:, None] * covariance * whitening)
        self._values = np.maximum(values, 0.0)
        self._rotation = whitening[:, None] * vectors
        self._ones = self._rotation.sum(0)
        self._rotated = self._rotation.T @ effect
        likelihood = np.stack([self._log_likelihood(ratio) for ratio in ratios])
        self.log_weights, self.log_evidence = _shared_weights(likelihood)

    def _at(
        self, ratio: float, genes: slice = slice(None)
    ) -> tuple[NDArray[np.float64], float, NDArray[np.float64], NDArray[np.float64]]:
        """Inverse eigenvalues, precision of means, means, and rotated residuals at a ratio."""
        inverse = 1 / (ratio * self._values + 1)
        weighted = inverse * self._ones
        precision = float(weighted @ self._ones)
        mean = weighted @ self._rotated[:, genes] / precision
        return inverse, precision, mean, self._rotated[:, genes] - np.outer(self._ones, mean)

    def _log_likelihood(self, ratio: float) -> NDArray[np.float64]:
        """Of each gene, up to what neither ratio nor kernel nor share change."""
        inverse, precision, _, residual = self._at(ratio)
        of_gene = self.noise.of_gene
        fit = inverse @ residual**2 / of_gene
        return 0.5 * (np.log(inverse).sum() - np.log(precision) - fit)

    def predict(self) -> Moments:
        """Effects of the new perturbations, errors of measurement not included."""
        cross = self.share * self.similarity.to_measured @ self._rotation
        own = self.share * self.similarity.own + 1 - self.share
        weights = np.exp(self.log_weights)
        first, second = np.zeros((2, len(own), self.effect.shape[1]))
        for place in np.flatnonzero((weights > 1e-12).any(1)):
            ratio = self.ratios[place]
            inverse, precision, mean, residual = self._at(ratio)
            value = mean + ratio * cross @ (inverse[:, None] * residual)
            # Of a new effect given mean and measured ones, and what is unknown of the mean.
            variance = ratio * own - ratio**2 * cross**2 @ inverse
            variance += (1 - ratio * cross @ (inverse * self._ones)) ** 2 / precision
            first += weights[place] * value
            second += weights[place] * (
                value**2 + np.maximum(variance, 0)[:, None] * self.noise.of_gene
            )
        return Moments(first, np.maximum(second - first**2, 0))

    def leave_one_out(self) -> Moments:
        """Effects of each measured perturbation, from all others (Dubrule 1983)."""
        n_perturbations, n_genes = self.effect.shape
        n_at_once = max(1, _MAX_ELEMENTS // (len(self.ratios) * n_perturbations))
        parts = []
        for start in range(0, n_genes, n_at_once):
            parts.append(self._leave_one_out(slice(start, min(start + n_at_once, n_genes))))
        return Moments(*(np.concatenate(columns, axis=1) for columns in zip(*parts, strict=True)))

    def _leave_one_out(self, genes: slice) -> Moments:
        effect, of_gene = self.effect[:, genes], self.noise.of_gene[genes]
        of_perturbation = self.noise.of_perturbation[:, None]
        log_weights, means, variances = [], [], []
        for place, ratio in enumerate(self.ratios):
            inverse, precision, _, residual = self._at(ratio, genes)
            from_mean = self._rotation @ (inverse * self._ones)
            diagonal = (self._rotation**2 @ inverse - from_mean**2 / precision)[:, None]
            error = self._rotation @ (inverse[:, None] * residual) / diagonal
            variance = of_gene / diagonal
            # What is left out has no say in the ratio of its gene either.
            density = norm.logpdf(error, 0, np.sqrt(variance))
            log_weights.append(self.log_weights[place, genes] - density)
            means.append(effect - error)
            variances.append(np.maximum(variance - of_perturbation * of_gene, 0))
        weights = softmax(np.stack(log_weights), axis=0)
        mean = (weights * means).sum(0)
        spread = (weights * (np.stack(variances) + (np.stack(means) - mean) ** 2)).sum(0)
        return Moments(mean, spread)


def _shared_weights(
    likelihood: NDArray[np.float64],
) -> tuple[NDArray[np.float64], float]:
    """Logarithms of posterior weights, ratios x genes, and evidence under the best prior weights.

    Parameters
    ----------
    likelihood
        Logarithms, ratios x genes.
    """
    log_prior = np.full((len(likelihood), 1), -np.log(len(likelihood)))
    evidence = -np.inf
    for _ in range(1_000):
        joint = log_prior + likelihood
        of_gene = logsumexp(joint, axis=0)
        before, evidence = evidence, float(of_gene.sum())
        if evidence - before < 1e-3:
            break
        with np.errstate(divide="ignore"):
            log_prior = np.log(np.exp(joint - of_gene).mean(1, keepdims=True))
    return joint - of_gene, evidence
