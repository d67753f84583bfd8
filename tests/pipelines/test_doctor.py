"""`lmr doctor`: what it finds, and what it calls a problem."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipelines import doctor as room
from pipelines.doctor import PACKAGES, doctor, judge_packages

WELL = dict.fromkeys(PACKAGES, "1.0") | {"faiss-cpu": "1.10"}


def test_a_sound_installation_has_no_problem() -> None:
    assert judge_packages(WELL) == ("faiss-cpu", [], [])


def test_two_flavours_of_faiss_are_a_problem_with_a_way_out() -> None:
    flavour, problems, _ = judge_packages(WELL | {"faiss-gpu": "1.15"})
    assert flavour == "faiss-cpu and faiss-gpu"
    assert len(problems) == 1
    assert "pip uninstall -y faiss-cpu faiss-gpu" in problems[0]
    assert "lmr-tools[cpu]" in problems[0]


def test_missing_packages_are_problems_and_missing_extras_hints() -> None:
    flavour, problems, hints = judge_packages(WELL | {"faiss-cpu": None, "torch": None})
    assert flavour is None
    assert [problem.split()[0] for problem in problems] == ["faiss", "torch"]
    assert hints == []
    _, problems, hints = judge_packages(WELL | {"lpips": None, "torchmetrics": None, "opencv-python": "4.1"})
    assert problems == []
    assert len(hints) == 2


def test_the_command_exits_1_on_a_clash_and_names_disk_devices_and_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMR_HOME", str(tmp_path / "not" / "made"))
    monkeypatch.setattr(room, "installed", lambda: WELL | dict.fromkeys(room.OPENCV[1:] + room.FAISS[1:]))
    result = CliRunner().invoke(doctor, ["--json"], catch_exceptions=False)
    found = json.loads(result.stdout)
    assert result.exit_code == 0
    assert found["faiss"] == "faiss-cpu"
    assert found["devices"][0].startswith("cpu, ")
    assert found["disk_free_bytes"][str(tmp_path / "not" / "made")] > 0
    missing = {row["name"]: row["way"] for row in found["weights"] if row["path"] is None}
    assert missing["effnet-lite0"] == "lmr weights fetch effnet-lite0"

    clash = dict.fromkeys(room.installed(), "1.0")
    monkeypatch.setattr(room, "installed", lambda: clash)
    result = CliRunner().invoke(doctor, [], catch_exceptions=False)
    assert result.exit_code == 1
    assert "PROBLEM" in result.stdout
