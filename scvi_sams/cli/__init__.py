"""The command line, ``scvi-sams fit`` and ``scvi-sams predict``.

Nothing here imports torch or scanpy before the arguments are known to be right.
"""

from scvi_sams.cli._main import main
from scvi_sams.cli._parser import build_parser

__all__ = ["build_parser", "main"]
