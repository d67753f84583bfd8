"""What the tests of `lmr evaluate` share: a folder of pictures, the command, and rows to compare."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from click.testing import CliRunner, Result

from lmr_tools.images import encode_png, resize
from lmr_tools.results import read_results
from lmr_tools.schema import ResultRow
from pipelines.cli import Commands
from pipelines.evaluate import evaluate
from pipelines.results import results

SOME = "psnr_rgb,psnr_y,ssim_y"


def call(command: object, *arguments: object) -> Result:
    group = Commands("lmr", commands={"evaluate": evaluate, "results": results})
    name = "evaluate" if command is evaluate else "results"
    return CliRunner().invoke(group, [name, *(str(argument) for argument in arguments)])


def run(data: Path, out: Path, *arguments: object, code: int = 0, benchmark: str = "folder") -> Result:
    result = call(
        evaluate, "--benchmark", benchmark, "--data", data, "--method", "bicubic", "--metrics", SOME, "--out", out,
        *arguments,
    )  # fmt: skip
    assert result.exit_code == code, result.output
    return result


def picture(seed: int, height: int = 40, width: int = 48) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    return resize(small, width, height)


def write_pictures(folder: Path) -> Path:
    """Four pictures without references."""
    folder.mkdir()
    for number in range(4):
        (folder / f"p{number}.png").write_bytes(encode_png(picture(number)))
    return folder


def plain(out: Path) -> list[ResultRow]:
    """Rows without what time and machine decide."""
    return [dataclasses.replace(row, seconds=None, peak_memory_mb=None, device="") for row in read_results(out)]
