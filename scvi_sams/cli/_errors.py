"""What the command line refuses, and how it says so."""

from __future__ import annotations

__all__ = ["PROGRAM", "CommandError", "one_line"]

PROGRAM = "scvi-sams"


class CommandError(Exception):
    """An argument, or the file it names, cannot be used; the message says how to mend it."""


def one_line(kind: str, message: str) -> str:
    """Format a message for stderr, on one line whatever its own layout."""
    return f"{PROGRAM}: {kind}: {' '.join(message.split())}"
