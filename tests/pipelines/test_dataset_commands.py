"""`lmr verify`, `lmr inspect`, `lmr explain`: output, exit codes, one line for bad input."""

import json
import shutil
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from PIL import Image as PilImage

from lmr_tools.schema import LmrError
from pipelines.explain import explain
from pipelines.inspect import inspect
from pipelines.verify import verify
from tests.lmr_tools.dataset_fixture import make_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("commands"))


class Group(click.Group):
    """Turns expected failures into one line, as the `lmr` command does."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LmrError as error:
            raise click.ClickException(str(error)) from None


def run(*arguments: object) -> Result:
    group = Group(commands=[verify, inspect, explain])
    return CliRunner().invoke(group, [str(argument) for argument in arguments])


def refused(code: int, expected: str, *arguments: object) -> None:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and expected in errors[0]
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", [verify, inspect, explain])
def test_help_describes_every_option(command: click.Command) -> None:
    result = CliRunner().invoke(command, ["--help"])
    assert result.exit_code == 0
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.opts[0] in result.output and parameter.help


def test_verify_a_sound_dataset(dataset: Path) -> None:
    result = run("verify", dataset, "--workers", 1)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert "4 shards, 7 samples, 42 pictures (decoded)" in result.stderr
    assert "sound: no problem found" in result.stderr


def test_verify_does_not_depend_on_the_number_of_workers(dataset: Path) -> None:
    reports = [run("verify", dataset, "--json", "--workers", workers).stdout for workers in (1, 2)]
    assert reports[0] == reports[1]
    report = json.loads(reports[0])
    assert report["sound"] is True and report["problems"] == [] and report["decoded"] is True
    assert report["rows"]["groups"] == 35


def test_verify_a_damaged_dataset(dataset: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(dataset, tmp_path / "copy")
    path = copy / "shards" / "val-000000.tar"
    path.write_bytes(path.read_bytes()[:5120])
    result = run("verify", copy, "--no-decode", "--workers", 1)
    assert result.exit_code == 4
    assert all(line.startswith("shards/val-000000.tar: ") for line in result.stdout.splitlines())
    assert "(not decoded)" in result.stderr
    report = run("verify", copy, "--json", "--workers", 1)
    assert report.exit_code == 4
    assert json.loads(report.stdout)["problems"] == result.stdout.splitlines()


def test_verify_something_else(tmp_path: Path) -> None:
    assert run("verify", tmp_path / "absent").exit_code == 2
    result = run("verify", tmp_path, "--workers", 1)
    assert result.exit_code == 4 and "not a dataset of lmr-tools" in result.stdout.splitlines()[0]


def test_inspect_shows_the_numbers(dataset: Path) -> None:
    result = run("inspect", dataset)
    assert result.exit_code == 0, result.output
    for expected in (
        "embedded with stub; clip score is the cosine of its vectors",
        "References by slot",
        "Graded pairs: 15 High, 80 Medium, 85 Low; without a tier: 0",
        "Photos: 30 used, 5 unused, 1 rejected",
        "scan: not an image",
    ):
        assert expected in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 110


def test_inspect_json_of_one_split(dataset: Path) -> None:
    summary = json.loads(run("inspect", dataset, "--split", "val", "--json").stdout)
    assert [(entry["split"], entry["groups"]) for entry in summary["splits"]] == [("val", 2)]
    assert summary["embedder"]["model"] == "stub"


def test_inspect_draws_the_groups_asked_for(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[str]] = []
    monkeypatch.setattr(
        "lmr_tools.preview.contact_sheet", lambda groups, path: drawn.append([group.group_id for group in groups])
    )
    out = tmp_path / "sheet.png"
    run("inspect", dataset, "--group", "g3-1", "--group", "g0-0", "--out", out)
    for seed in (1, 1, 2):
        run("inspect", dataset, "--groups", 3, "--seed", seed, "--out", out)
    run("inspect", dataset, "--split", "val", "--out", out)
    assert drawn[0] == ["g3-1", "g0-0"]
    assert drawn[1] == drawn[2] != drawn[3]
    assert len(set(drawn[1])) == 3
    assert sorted(drawn[4]) == ["g3-0", "g3-1"]


def test_inspect_writes_a_picture(dataset: Path, tmp_path: Path) -> None:
    result = run("inspect", dataset, "--groups", 2, "--out", tmp_path / "sheet.jpg", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)
    with PilImage.open(tmp_path / "sheet.jpg") as picture:
        assert picture.format == "JPEG" and picture.width > 1000


def test_inspect_refuses_with_one_line(dataset: Path, tmp_path: Path) -> None:
    refused(2, "name the picture with --out", "inspect", dataset, "--groups", 3)
    refused(2, "use one of the two", "inspect", dataset, "--groups", 3, "--group", "a", "--out", tmp_path / "a.png")
    refused(1, "no group 'g0-9'; 7 groups, for example g0-0", "inspect", dataset, "--group", "g0-9", "--out", "a.png")
    refused(1, "pictures are written as .png or .jpg", "inspect", dataset, "--out", tmp_path / "a.bmp")
    refused(1, "not a dataset of lmr-tools", "inspect", tmp_path)
    refused(2, "does not exist", "inspect", tmp_path / "absent")


def test_explain_says_why(dataset: Path) -> None:
    result = run("explain", dataset, "g1-0")
    assert result.exit_code == 0, result.output
    for expected in (
        "target     place 1/view-0.png (s1v0, 240x180)",
        "crop       64x64 at (30, 30)",
        "High: overlap > 0.3 and scale ratio > 0.9",
        "M1   tier M  place 1/view-2.png (s1v2)",
        "overlap 1.000, scale ratio 0.800; 60 matches, 40 inliers, 36 agree; rank 0, embedding 0.950",
        "--   tier M  place 1/view-6.png (s1v6)",
    ):
        assert expected in result.stdout


def test_explain_as_json(dataset: Path) -> None:
    value = json.loads(run("explain", dataset, "g1-0", "--json").stdout)
    assert [row["slot"] for row in value["references"]] == ["H", "M1", "M2", "L1", "L2"]
    assert len(value["considered"]) == 6
    assert value["considered"][0]["pair"]["tier"] == "H"


def test_explain_draws(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmr_tools.explanation.draw_evidence", lambda dataset, found, path: f"drew {path.name}")
    result = run("explain", dataset, "g1-0", "--out", tmp_path / "m.png")
    assert result.exit_code == 0 and "drew m.png" in result.stderr


def test_explain_refuses_with_one_line(dataset: Path, tmp_path: Path) -> None:
    refused(1, "no group 'g1-7'; 7 groups, for example", "explain", dataset, "g1-7")
    refused(1, "it is the target of g1-0, g1-1", "explain", dataset, "s1v0")
    refused(1, "not a dataset of lmr-tools", "explain", tmp_path, "g1-0")
    refused(2, "Missing argument", "explain", dataset)
