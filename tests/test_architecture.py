"""The rules of the house, kept by tests: imports go one way, modules stay small, --help stays instant."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("lmr_tools", "mrefsr", "pipelines")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
# What every room of lmr_tools stands on: the floor, and the storey that all others share.
GROUND = {"schema", "config", "images", "tables", "workers"}
HEAVY = {
    "torch",
    "faiss",
    "cv2",
    "numpy",
    "pandas",
    "pyarrow",
    "numba",
    "open_clip",
    "pydantic",
    "webdataset",
    "PIL",
    "rich",
}
LONGEST = 400


def imported(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names if node.module in PACKAGES}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    allowed = {"lmr_tools": {"lmr_tools"}, "mrefsr": {"lmr_tools", "mrefsr"}, "pipelines": {"lmr_tools", "mrefsr"}}
    package = path.relative_to(ROOT).parts[0]
    own = {name.split(".")[0] for name in imported(path)} & {*PACKAGES, "lmr_pipelines", "tests", "benchmarks"}
    assert own <= allowed[package]


@pytest.mark.parametrize("path", sorted((ROOT / "lmr_tools").glob("*.py")), ids=lambda path: path.stem)
def test_a_room_that_uses_another_says_so(path: Path) -> None:
    siblings = {name.split(".")[1] for name in imported(path) if name.startswith("lmr_tools.")}
    above_ground = siblings - GROUND - {path.stem}
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert {name for name in above_ground if f"`{name}`" not in text} == set()
    if path.stem in {"schema", "config"}:
        assert siblings <= {"schema"}


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines").glob("*.py")), ids=lambda path: path.stem)
def test_commands_import_heavy_packages_in_their_bodies(path: Path) -> None:
    assert {name.split(".")[0] for name in imported(path, top_level_only=True)} & HEAVY == set()


def test_help_does_not_load_a_heavy_package() -> None:
    code = "import sys, lmr_pipelines.cli; print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert HEAVY & set(ast.literal_eval(loaded)) == set()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_are_one_room(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= LONGEST, f"{lines} lines: is this one room, or two?"
    if path.name == "__init__.py":
        assert lines == 0


def test_no_address_of_this_workplace_is_committed() -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )
    marks = ("/" + "work/main", "file" + ":///opt", "/" + "opt/pypi")
    for name in files:
        path = ROOT / name
        if name and path.is_file() and path.suffix in {".py", ".md", ".toml", ".yaml", ".yml", ""}:
            text = path.read_text(encoding="utf-8", errors="ignore")
            assert not any(mark in text for mark in marks), name


def test_every_benchmark_is_listed() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    programs = [p.stem for p in sorted((ROOT / "benchmarks").glob("*.py")) if "\ndef main(" in p.read_text()]
    assert len(programs) > 10
    assert [name for name in programs if f"| `{name}` |" not in page] == []
