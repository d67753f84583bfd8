"""`lmr weights`: the table says what is here and how to get the rest; fetch prints the path."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from lmr_tools import weight_fetch
from lmr_tools.schema import LmrError
from lmr_tools.weights import WEIGHTS, features_only, get, torch_checkpoints
from pipelines.weights import weights


@pytest.fixture(autouse=True)
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("LMR_HOME", str(tmp_path / "lmr"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))


def listed() -> dict[str, dict]:
    result = CliRunner().invoke(weights, ["--json"], catch_exceptions=False)
    return {row["name"]: row for row in json.loads(result.stdout)}


def test_every_file_is_listed_with_size_licence_origin_and_way(tmp_path: Path) -> None:
    rows = listed()
    assert set(rows) == {entry.name for entry in WEIGHTS}
    for row in rows.values():
        assert row["megabytes"] > 0
        assert row["licence"] and row["origin"] and row["way"] and row["purpose"]
    assert rows["vgg19"]["path"] is None
    assert rows["vgg19"]["way"] == "lmr weights fetch vgg19"
    assert rows["vgg19"]["goes_to"] == str(tmp_path / "torch" / "hub" / "checkpoints" / "vgg19-dcbb9e9d.pth")
    assert rows["effnet-lite0"]["goes_to"].startswith(str(tmp_path / "lmr"))


def test_what_is_here_is_shown_with_its_path() -> None:
    full, part = torch_checkpoints() / get("vgg19").file, features_only(get("alexnet"))
    for path in (full, part):
        path.parent.mkdir(parents=True)
        path.touch()
    rows = listed()
    assert (rows["vgg19"]["path"], rows["vgg19"]["features_only"]) == (str(full), False)
    assert (rows["alexnet"]["path"], rows["alexnet"]["features_only"]) == (str(part), True)
    shown = CliRunner().invoke(weights, [], catch_exceptions=False).stdout
    assert "here" in shown
    assert "convolutions only" in shown
    assert "lmr weights fetch effnet-lite0" in shown


def test_fetch_prints_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    path = features_only(get("vgg16"))
    monkeypatch.setattr(weight_fetch, "fetch", lambda name, source: path)
    result = CliRunner().invoke(weights, ["fetch", "vgg16"], catch_exceptions=False)
    assert result.stdout == f"{path}\n"
    assert f"set TORCH_HOME={path.parents[2]}" in result.stderr


def test_fetch_of_an_unknown_name_lists_the_names() -> None:
    result = CliRunner().invoke(weights, ["fetch", "vgg20"])
    assert isinstance(result.exception, LmrError)
    assert "there are clip-vit-b-32" in str(result.exception)
