"""The published networks' numbers: every section of shared/parity/check.py that the adapter offers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests import parity_adapter

SECTIONS = ("match", "pre_offset", "extractor", "vgg_ref", "mrefsr", "mrefsr_grads", "fusion")
TRAINING = ("loss", "disc", "gan", "gradient_penalty")


@pytest.fixture(scope="module")
def check(shared: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("parity_check", shared / "parity" / "check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")  # check.py's float(loss)
@pytest.mark.parametrize("section", SECTIONS + TRAINING)
def test_parity(check: ModuleType, section: str, capsys: pytest.CaptureFixture[str]) -> None:
    # features have one section, under the name of its first function
    compare = check.SECTIONS["extractor" if section == "vgg_ref" else section]
    check.RES.clear()
    compare(parity_adapter)
    assert check.RES
    failed = [label for ok, label in check.RES if not ok]
    assert not failed, capsys.readouterr().out
