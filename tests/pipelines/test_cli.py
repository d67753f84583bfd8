"""Every command is documented, explains itself, and fails in one line."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from lmr_tools.schema import LmrError
from pipelines.cli import Commands, cli

DOCS = Path(__file__).resolve().parents[2] / "docs"


def commands(group: click.Group, name: str = "lmr") -> Iterator[tuple[str, click.Command]]:
    for key, command in group.commands.items():
        yield f"{name} {key}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{name} {key}")


ALL = dict(commands(cli))


@pytest.mark.parametrize("name", ALL)
def test_a_command_is_documented_and_explains_every_option(name: str) -> None:
    assert f"`{name}" in (DOCS / "commands.md").read_text()
    assert ALL[name].help
    for parameter in ALL[name].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
    result = CliRunner().invoke(cli, [*name.split()[1:], "--help"])
    assert result.exit_code == 0


def test_the_recipe_page_lists_every_key_with_its_default() -> None:
    from lmr_tools.config import BuildConfig

    page = (DOCS / "recipe.md").read_text()
    for key, field in BuildConfig.model_fields.items():
        assert f"| `{key}` | `{field.default}` | {field.description or ''}".rstrip() in page, key


@pytest.mark.parametrize(
    ("error", "text", "code"),
    [
        (LmrError("a.jpg: broken; replace it"), "Error: a.jpg: broken; replace it", 1),
        (OSError(28, "No space left on device", "/data/x.tar"), "the disk is full; make room", 1),
        (PermissionError(13, "Permission denied", "/data"), "/data: Permission denied", 1),
        (KeyboardInterrupt(), "interrupted", 130),
    ],
)
def test_expected_failures_are_one_line(error: BaseException, text: str, code: int) -> None:
    @click.group(cls=Commands)
    @click.option("--debug", is_flag=True)
    def group(debug: bool) -> None:
        pass

    @group.command()
    def fail() -> None:
        raise error

    result = CliRunner().invoke(group, ["fail"])
    assert result.exit_code == code
    assert text in result.output
    assert "Traceback" not in result.output
    if not isinstance(error, KeyboardInterrupt):
        assert CliRunner().invoke(group, ["--debug", "fail"]).exception is error


def test_the_installed_command_answers() -> None:
    lmr = Path(sys.executable).with_name("lmr")
    if not lmr.exists():
        pytest.skip("lmr-tools is not installed into this environment")
    done = subprocess.run([lmr, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("lmr, version ")
