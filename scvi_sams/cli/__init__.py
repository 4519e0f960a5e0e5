from scvi_sams.cli._main import main

__all__ = ["main"]
