"""``python -m benchmarks NAME [arguments]``."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import benchmarks

NAMES = sorted(
    module.name for module in pkgutil.iter_modules(benchmarks.__path__) if module.name[0] != "_"
)

if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
    raise SystemExit(f"usage: python -m benchmarks {{{','.join(NAMES)}}} [arguments]")
sys.exit(importlib.import_module(f"benchmarks.{sys.argv[1]}").main(sys.argv[2:]))
