"""Logits of the decoder as shares of a library."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["log_share"]


def log_share(logits: Tensor, ceiling: Tensor | None = None) -> Tensor:
    r"""Logarithm of the mean expression of each gene per unit of library.

    Where the library is the sum of the genes' counts, their shares must add up to one: a softmax.
    A size factor that the user gives is another matter, since it may count genes that were left
    out, or be on a scale of its own. There the shares are those of a softmax with one more
    category, whose logit is zero and which nobody measures,

    .. math:: \rho_{ig} = c \, \frac{\exp(a_{ig})}{1 + \sum_h \exp(a_{ih})},

    so that no gene has to take up what the others leave.

    Parameters
    ----------
    logits
        Unnormalised log expression :math:`a`, shape ``(..., n_genes)``.
    ceiling
        What all genes together can reach per unit of library, :math:`c`, a scalar; ``None`` if
        the library is the sum of the counts.

    Returns
    -------
    Shape of ``logits``.

    Examples
    --------
    >>> log_share(torch.zeros(3)).exp()
    tensor([0.3333, 0.3333, 0.3333])
    >>> log_share(torch.zeros(3), ceiling=torch.tensor(2.0)).exp()
    tensor([0.5000, 0.5000, 0.5000])
    """
    if ceiling is None:
        return torch.log_softmax(logits, -1)
    of_all = torch.nn.functional.softplus(torch.logsumexp(logits, -1, keepdim=True))
    return logits - (of_all - ceiling.log().to(logits.dtype))
