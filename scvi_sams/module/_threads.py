"""Many small problems of linear algebra, which threads only slow down."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["one_thread"]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread of the processor inside of a block.

    Thousands of singular value decompositions of a few dozen rows each take three times as long
    on two threads as on one, and forty times if other programs are busy on the same cores: the
    threads wait for each other. A decorator too.

    Examples
    --------
    >>> with one_thread():
    ...     torch.get_num_threads()
    1
    """
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
