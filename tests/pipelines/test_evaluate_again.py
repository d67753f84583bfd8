"""A run of `lmr evaluate` that is stopped, killed, shared, widened, fails, or is scored again."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lmr_tools import metrics
from lmr_tools.images import downscale, encode_png, upscale
from lmr_tools.results import TABLE, read_results
from mrefsr import systems
from pipelines.evaluate import evaluate
from pipelines.results import results
from tests.pipelines.evaluate_fixture import SOME, call, picture, plain, run, write_pictures


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "pictures")


def test_a_stopped_run_goes_on_and_gives_the_same_rows(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def stopping(lr: np.ndarray, references: object) -> np.ndarray:
        calls.append(len(calls))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return upscale(lr)

    method = systems.Method(references=0, restore=stopping)
    monkeypatch.setitem(systems.METHODS, "bicubic", method)  # type: ignore[call-overload]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(data, stopped, code=130)
    run(data, stopped)
    assert len(calls) in (5, 6)  # the second picture was perhaps not yet scored when the third stopped the run
    run(data, stopped)
    assert len(calls) in (5, 6)
    run(data, whole)
    assert plain(whole) == plain(stopped)


def test_a_killed_run_goes_on(data: Path, tmp_path: Path) -> None:
    """SIGKILL while the third picture is worked on: what lies in the folder is whole, and is not made again."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    program = f"""
import os, signal
from mrefsr import systems
from lmr_tools.images import upscale
calls = []
def restore(lr, references):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return upscale(lr)
systems.METHODS["bicubic"] = systems.Method(references=0, restore=restore)
from pipelines.evaluate import evaluate
evaluate(["--benchmark", "folder", "--data", {str(data)!r}, "--method", "bicubic", "--metrics", {SOME!r},
          "--out", {str(killed)!r}])
"""
    root = Path(__file__).resolve().parents[2]
    dead = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, check=False)
    assert dead.returncode == -signal.SIGKILL, dead.stderr.decode()
    assert not (killed / TABLE).exists()
    assert "its evaluation was stopped, run the same lmr evaluate again" in call(results, killed).stderr
    kept = {path.name: path.stat().st_mtime_ns for path in (killed / "rows").glob("*/*.json")}
    assert 1 <= len(kept) <= 2
    run(data, killed)
    run(data, whole)
    assert plain(killed) == plain(whole)
    assert kept == {
        path.name: path.stat().st_mtime_ns for path in (killed / "rows").glob("*/*.json") if path.name in kept
    }


def test_shares_make_the_same_table(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, shared, by_torchrun = tmp_path / "whole", tmp_path / "shared", tmp_path / "torchrun"
    run(data, whole)
    assert "2 rows" in run(data, shared, "--share", "2/2").output
    run(data, shared, "--share", "1/2")
    assert plain(shared) == plain(whole)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        run(data, by_torchrun)
    assert plain(by_torchrun) == plain(whole)


def test_torchrun_lets_all_processes_finish(data: Path, tmp_path: Path) -> None:
    """The first process meets a broken picture at once and ends with exit code 3; the other has its share to do."""
    (data / "p0.png").write_bytes(b"x")
    program = tmp_path / "slow.py"
    program.write_text(
        "import os, sys, time; sys.path.insert(0, os.getcwd())\n"
        "from pipelines.cli import main\n"
        "time.sleep(3 * int(os.environ['RANK']))\n"
        "main()\n"
    )
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program),
        "evaluate",
        "--benchmark", "folder", "--data", str(data), "--method", "bicubic", "--metrics", SOME,
        "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "exitcode  : 3" in done.stderr, done.stderr
    assert [row.failure is None for row in read_results(tmp_path / "run")] == [False, True, True, True]


def test_limit_is_widened_later(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(data, out, "--limit", 2)
    assert len(read_results(out)) == 2
    assert json.loads(run(data, out, "--json").stdout)["runs"][0] | {"run_id": ""} == {
        "run_id": "", "label": "bicubic", "references": None, "rows": 4, "made": 2, "failed": 0
    }  # fmt: skip


def test_a_broken_picture_is_a_failed_row_and_tried_again(data: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "run", (data / "p1.png").read_bytes()
    (data / "p1.png").write_bytes(whole[:200])
    result = run(data, out, code=3)
    assert "p1: failed" in result.stderr and "p1.png: broken" in result.stderr
    rows = read_results(out)
    assert [row.failure is None for row in rows] == [True, False, True, True]
    assert rows[1].psnr_y is None and rows[1].sr is None
    assert "3       1" in call(results, out).stdout
    (data / "p1.png").write_bytes(whole)
    run(data, out)
    assert all(row.failure is None for row in read_results(out))


def test_too_small_for_ssim_is_a_failed_row(data: Path, tmp_path: Path) -> None:
    (data / "p2.png").write_bytes(encode_png(picture(2, 16, 40)))
    run(data, tmp_path / "run", code=3)
    assert "too small" in str(read_results(tmp_path / "run")[2].failure)


def test_memory_that_runs_out_fails_the_picture_and_a_bug_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: 9 bytes"), None, None]

    def restore(lr: np.ndarray, references: object) -> np.ndarray:
        error = errors.pop(0)
        if error:
            raise error
        return upscale(lr)

    method = systems.Method(references=0, restore=restore)
    monkeypatch.setitem(systems.METHODS, "bicubic", method)  # type: ignore[call-overload]
    run(data, tmp_path / "run", code=3)
    reasons = [row.failure for row in read_results(tmp_path / "run")]
    assert reasons[2:] == [None, None] and all("memory ran out" in str(reason) for reason in reasons[:2])
    errors[:] = [RuntimeError("a bug")]
    result = call(
        evaluate, "--benchmark", "folder", "--data", data, "--method", "bicubic", "--metrics", SOME, "--out",
        tmp_path / "run",
    )  # fmt: skip
    assert isinstance(result.exception, RuntimeError) and "a bug" in str(result.exception)


def test_scoring_again(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(data, out)
    before = plain(out)
    for path in (out / "rows").glob("*/*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"psnr_y": 1.0, "ssim_y": None}))
    result = call(evaluate, "--rescore", out, "--metrics", SOME)
    assert "4 of 4 rows scored again" in result.stdout and plain(out) == before
    sr = out / str(before[2].sr)
    sr.write_bytes(encode_png(picture(2)))
    call(evaluate, "--rescore", out, "--metrics", SOME)
    assert [row.psnr_rgb == np.inf for row in plain(out)] == [False, False, True, False]
    (data / "p0.png").write_bytes(encode_png(picture(0, 44, 48)))
    result = call(evaluate, "--rescore", out, "--metrics", SOME)
    assert result.exit_code == 3 and "p0: failed, SR is 48x40, the target 48x44" in result.stderr
    (data / "p0.png").write_bytes(encode_png(picture(9)))
    result = call(evaluate, "--rescore", out, "--metrics", SOME)
    assert result.exit_code == 3 and "p0: failed, the target is another picture" in result.stderr
    (data / "p0.png").write_bytes(encode_png(picture(0)))
    assert call(evaluate, "--rescore", out, "--metrics", SOME).exit_code == 0
    assert plain(out)[:2] == before[:2]
    moved = data.rename(data.with_name("moved"))
    assert "no such folder" in call(evaluate, "--rescore", out, "--metrics", SOME).output
    assert call(evaluate, "--rescore", out, "--metrics", SOME, "--data", moved).exit_code == 0
    gone = (moved / "p3.png").rename(moved / "p3.txt")
    result = call(evaluate, "--rescore", out, "--metrics", SOME, "--data", moved)
    assert result.exit_code == 3 and "p3: failed, the test set does not hold it any more" in result.stderr
    gone.rename(moved / "p3.png")
    assert call(evaluate, "--rescore", out, "--metrics", SOME, "--data", moved).exit_code == 0
    assert plain(out)[:2] == before[:2] and plain(out)[3] == before[3]


def test_a_target_replaced_under_its_name_is_made_again(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(data, out)
    before = plain(out)
    os.utime(data / "p1.png")  # the same picture, copied again say
    assert "4 rows, 0 of them new" in run(data, out).stdout and plain(out) == before
    old = (data / "p2.png").stat().st_mtime - 1e6
    (tmp_path / "other.png").write_bytes(encode_png(picture(9)))
    os.utime(tmp_path / "other.png", (old, old))  # an old file that is moved in
    (tmp_path / "other.png").replace(data / "p2.png")
    assert "4 rows, 1 of them new" in run(data, out).stdout
    after = plain(out)
    assert after[2].target_sha256 != before[2].target_sha256
    assert after[2].psnr_y == metrics.psnr_y(upscale(downscale(picture(9))), picture(9))
    assert [after[place] for place in (0, 1, 3)] == [before[place] for place in (0, 1, 3)]


def test_a_metric_is_added_from_the_pictures(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    base = ("--benchmark", "folder", "--data", data, "--method", "bicubic", "--out", out)
    assert call(evaluate, *base, "--metrics", "psnr_y").exit_code == 0
    first = read_results(out)
    assert first[0].ssim_y is None
    result = call(evaluate, *base, "--metrics", SOME, "--json")
    assert json.loads(result.stdout)["runs"][0]["made"] == 0
    second = read_results(out)
    assert [row.seconds for row in first] == [row.seconds for row in second]
    assert all(row.ssim_y is not None for row in second)
