"""Peak memory sees what was allocated since the start, and forgets what came before."""

import sys

import numpy as np
import pytest
import torch

from mrefsr.cost import device_name, peak_memory, start_peak, versions

CPU = torch.device("cpu")
MB = 1e6


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can forget a peak")
def test_peak_is_that_since_the_start() -> None:
    start_peak(CPU)
    idle = peak_memory(CPU)
    block = np.ones(300_000_000, np.uint8)
    during = peak_memory(CPU)
    del block
    after = peak_memory(CPU)
    start_peak(CPU)
    forgotten = peak_memory(CPU)
    assert idle is not None and during is not None and after is not None and forgotten is not None
    assert during - idle > 250 * MB and after == pytest.approx(during, abs=5 * MB)
    assert forgotten < during - 250 * MB


def test_names() -> None:
    assert device_name(CPU) == f"cpu ({torch.get_num_threads()} threads)"
    assert versions()["torch"] == torch.__version__.split("+")[0]
