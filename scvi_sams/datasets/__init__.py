from scvi_sams.datasets._benchmark_screens import BENCHMARK_SCREENS, benchmark_screen
from scvi_sams.datasets._cache import DatasetUnavailableError
from scvi_sams.datasets._paper_simulators import simulated_bereket_2023, simulated_lopez_2023
from scvi_sams.datasets._public import (
    dixit_2016,
    norman_2019,
    papalexi_2021,
    replogle_2022_k562_essential,
    replogle_2022_k562_gwps,
    replogle_2022_rpe1,
    srivatsan_2020_sciplex3,
)
from scvi_sams.datasets._simulated import simulated_screen
from scvi_sams.datasets._tidy import tidy_dixit, tidy_papalexi, tidy_sciplex, tidy_scperturb

__all__ = [
    "BENCHMARK_SCREENS",
    "DatasetUnavailableError",
    "benchmark_screen",
    "dixit_2016",
    "norman_2019",
    "papalexi_2021",
    "replogle_2022_k562_essential",
    "replogle_2022_k562_gwps",
    "replogle_2022_rpe1",
    "simulated_bereket_2023",
    "simulated_lopez_2023",
    "simulated_screen",
    "srivatsan_2020_sciplex3",
    "tidy_dixit",
    "tidy_papalexi",
    "tidy_sciplex",
    "tidy_scperturb",
]
