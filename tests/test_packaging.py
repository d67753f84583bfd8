"""A wheel holds all that an installed `lmr` needs: every module, and the files of the report's page."""

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_the_wheel_is_whole(tmp_path: Path) -> None:
    if importlib.util.find_spec("setuptools") is None:  # not imported: it objects to a distutils that is loaded already
        pytest.skip("building a wheel offline needs setuptools")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("lmr_tools", "mrefsr", "pipelines"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(tmp_path)]
    command = [sys.executable, "-m", "pip", "wheel", str(source), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = {
        path.relative_to(source) for path in source.glob("*/**/*") if path.is_file() and "egg-info" not in str(path)
    }
    wanted = {path.as_posix().replace("pipelines/", "lmr_pipelines/", 1) for path in files if path.parts[0] != "build"}
    assert held == wanted and "lmr_tools/page/report.html" in held
