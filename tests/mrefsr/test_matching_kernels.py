"""Matching kernels that must be set up before the first import: other registers, Triton's interpreter, no cache."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mrefsr import matching_cpu

ROOT = Path(__file__).resolve().parents[2]


def run_python(code: str, **environment: str) -> str:
    """Run code in a process of its own, for what must be set before the first import."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


COMPARE = """
import torch
from mrefsr import matching
generator = torch.Generator().manual_seed(0)
for h, w, h2, w2, channels in ((5, 6, 7, 8, 4), (3, 3, 3, 3, 2), (4, 14, 5, 41, 3)):
    feat_in = matching.normalize_channels(torch.randn(channels, h, w, generator=generator))
    feat_ref = matching.normalize_channels(torch.randn(channels, h2, w2, generator=generator))
    feat_ref[:, :, -3:] = feat_ref[:, :, :3].clone()
    index, value = matching.match_patches(feat_in, feat_ref, backend="torch", normalize_input=False)
    scale = 1 / (matching._patch_norms(feat_ref) + 1e-5)
    for other_index, other_value in others(feat_in, feat_ref, scale):
        assert torch.equal(index, other_index), (h, w, h2, w2)
        assert (value - other_value).abs().max() <= 1e-5
print("same")
"""


def test_importing_compiles_nothing() -> None:
    heavy = {"numba", "llvmlite", "triton", "mrefsr.matching_cpu", "mrefsr.matching_triton"}
    assert run_python(f"import sys, mrefsr.matching; print(sorted({heavy} & set(sys.modules)))").strip() == "[]"


def test_tile_for_wide_registers_gives_the_same(tmp_path: Path) -> None:
    """The tile for AVX-512 CPUs on any CPU: numba is up before it is told, so it emits what this CPU has."""
    setup = """
import numba
numba.njit(lambda: 0)()
from llvmlite import binding
binding.get_host_cpu_features = lambda: {"avx512f": True}
from mrefsr import matching_cpu
assert (matching_cpu.ROWS, matching_cpu.LANES) == (12, 16)
def others(*arguments):
    yield matching_cpu.match(*arguments, threads=1)
    yield matching_cpu.match(*arguments, threads=2)
"""
    assert run_python(setup + COMPARE, NUMBA_CACHE_DIR=str(tmp_path)).strip() == "same"


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
def test_triton_kernel_gives_the_same_in_the_interpreter() -> None:
    setup = """
from mrefsr import matching_triton
def others(*arguments):
    yield matching_triton.match(*arguments)
    yield matching_triton.match(*arguments, ring_bytes=1)  # one reference row, one input row at a time
import torch
ones = torch.ones(1, 3, 4), torch.ones(1, 40, 60), torch.ones(38, 58)
for programs in (1, 2, 1000):  # several blocks in one program, several programs
    assert not matching_triton.match(*ones, programs=programs)[0].any()
"""
    assert run_python(setup + COMPARE, TRITON_INTERPRET="1").strip() == "same"


def test_without_a_writable_cache_the_kernel_still_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def njit(**options: bool) -> Any:
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: (function, options)

    monkeypatch.setattr(matching_cpu, "njit", njit)
    assert matching_cpu._compiled(abs) == (abs, {"nogil": True})
