"""The command line as ``python -m scvi_sams``."""

import sys

from scvi_sams.cli import main

sys.exit(main())
