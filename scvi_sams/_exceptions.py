"""The errors of this package, and the wording that they share."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class ScreenError(ValueError):
    """The AnnData, or an argument that describes it, cannot be used as it is.

    The message names the culprit (cell, gene, perturbation, argument) and the mend. The command
    line prints it as one line.
    """


class UnknownPerturbationError(ScreenError):
    """A condition names a perturbation that the model has never seen."""


class TrainingDivergedError(RuntimeError):
    """Training produced values that are not finite and could not be continued."""


class FitWarning(UserWarning):
    """A fit was too short to be read, or learned its training cells by heart."""


def listed(items: Iterable[object], limit: int = 5) -> str:
    """Quote the first `limit` items and count the rest.

    Examples
    --------
    >>> listed(["KLF1", "CEBPA", "JAK2"], limit=2)
    "'KLF1', 'CEBPA' and 1 more"
    """
    items = list(items)
    shown = ", ".join(repr(str(item)) for item in items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"


def counted(number: int, noun: str) -> str:
    """A number with its noun, whose plural takes an s.

    Examples
    --------
    >>> counted(1, "latent"), counted(1_200, "gene")
    ('1 latent', '1,200 genes')
    """
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def printable(text: object) -> str:
    r"""Text from data without characters that move a cursor, colour a terminal or end a line.

    Examples
    --------
    >>> print(printable("red\x1b[31m"))
    red\x1b[31m
    """
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode()
        for each in str(text)
    )


def nearest(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """Find the known names spelt most like `name`, whatever their case.

    Examples
    --------
    >>> nearest("klf2", ["KLF1", "CEBPA", "JAK2"])
    ['KLF1']
    """
    by_lowercase: dict[str, list[str]] = {}
    for candidate in known:
        by_lowercase.setdefault(candidate.lower(), []).append(candidate)
    matches = difflib.get_close_matches(name.lower(), by_lowercase, n=n)
    return [candidate for match in matches for candidate in sorted(by_lowercase[match])][:n]


def unknown_perturbations(
    unknown: Sequence[str], names: Sequence[str], limit: int = 5
) -> UnknownPerturbationError:
    """Build the error for perturbations that are not among `names`."""
    culprits = []
    for name in unknown[:limit]:
        close = nearest(name, names)
        culprits.append(f"{name!r} (nearest: {listed(close)})" if close else repr(name))
    if len(unknown) > limit:
        culprits.append(f"{len(unknown) - limit} more")
    return UnknownPerturbationError(
        f"Unknown perturbations: {', '.join(culprits)}. The {len(names)} known ones are "
        f"{listed(names)}. Correct the names or leave these out; cells of new perturbations are "
        "added to a fitted model by load_query_data(..., new_perturbations=True)."
    )
