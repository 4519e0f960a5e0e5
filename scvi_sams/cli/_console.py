"""What the command line says: lines without markup, whatever the names in the data hold."""

from __future__ import annotations

import io
import sys

from scvi_sams._exceptions import printable

PROGRAM = "scvi-sams"


class CommandError(Exception):
    """An argument, or the file it names, cannot be used; the message says how to mend it."""


def say(line: str) -> None:
    """Print a line of progress on stderr, as stdout is for results."""
    print(printable(line), file=sys.stderr, flush=True)


def one_line(kind: str, message: str) -> str:
    """Format a message for stderr, on one line whatever its own layout."""
    return f"{PROGRAM}: {kind}: {printable(' '.join(message.split()))}"


class Progress(io.TextIOBase):
    """stderr for what libraries print on stdout, which is for results.

    But for one thing: scvi-tools prints every exception of training before it raises it again.
    """

    _printed_too = False

    def write(self, text: str) -> int:
        """Pass text on."""
        self._printed_too |= text.startswith("Exception raised during training.")
        if not self._printed_too:
            sys.stderr.write(text)
        self._printed_too &= not text.endswith("\n")
        return len(text)

    def flush(self) -> None:
        """Show what was written."""
        sys.stderr.flush()

    def isatty(self) -> bool:
        """Whether a bar may redraw itself."""
        return sys.stderr.isatty()
