"""Public screens, fetched once and checked ever after, and simulators whose truth is known."""

from scvi_sams.datasets._cache import DatasetUnavailableError
from scvi_sams.datasets._paper_simulators import simulated_bereket_2023, simulated_lopez_2023
from scvi_sams.datasets._public import fetch_screen, public_screen, tidy_screen
from scvi_sams.datasets._simulated import benchmark_screen, simulated_screen

__all__ = [
    "DatasetUnavailableError",
    "benchmark_screen",
    "fetch_screen",
    "public_screen",
    "simulated_bereket_2023",
    "simulated_lopez_2023",
    "simulated_screen",
    "tidy_screen",
]
