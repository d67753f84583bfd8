"""`lmr evaluate` and `lmr results`: rows against the metrics by hand, going on, sharing, failing, scoring again."""

import csv
import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner, Result

from lmr_tools import metrics
from lmr_tools.images import decode, downscale, encode_png, resize, upscale
from lmr_tools.results import TABLE, read_results
from lmr_tools.schema import LmrError, ResultRow
from lmr_tools.testset_layouts import LAYOUTS
from mrefsr import evaluation, evaluation_plan, systems
from mrefsr.checkpoints import save_model
from mrefsr.config import MODEL_PRESETS
from mrefsr.model import MRefSR
from pipelines import evaluate as module
from pipelines.cli import Commands
from pipelines.evaluate import evaluate
from pipelines.results import results
from tests.lmr_tools.dataset_fixture import make_dataset

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


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(4):
        (folder / f"p{number}.png").write_bytes(encode_png(picture(number)))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MRefSR of random weights: a stand-in for a trained one."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    # Matches that are not refined: else made-up references, which agree with nothing, would be refused.
    save_model(path, MRefSR(dataclasses.replace(MODEL_PRESETS["mrefsr-tiny"], refine_matches=False)), {})
    return path


def plain(out: Path) -> list[ResultRow]:
    """Rows without what time and machine decide."""
    return [dataclasses.replace(row, seconds=None, peak_memory_mb=None, device="") for row in read_results(out)]


def test_the_command_offers_what_there_is() -> None:
    assert set(module.BENCHMARKS) == {*LAYOUTS, "dataset"}
    assert set(module.METHODS) == set(systems.METHODS)
    assert module.METRICS == evaluation.METRICS


def test_rows_are_what_the_metrics_say(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(data, out)
    rows = read_results(out)
    assert [row.image_id for row in rows] == ["p0", "p1", "p2", "p3"]
    for number, row in enumerate(rows):
        target = picture(number)
        sr = upscale(downscale(target))
        assert row.sr is not None
        np.testing.assert_array_equal(decode((out / row.sr).read_bytes()), sr)
        assert row.psnr_rgb == metrics.psnr_rgb(sr, target)
        assert row.psnr_y == metrics.psnr_y(sr, target)
        assert row.ssim_y == metrics.ssim_y(sr, target)
        assert row.lpips_alex is None and row.failure is None and row.seconds is not None and row.seconds > 0
        assert (row.protocol, row.method, row.n_references, row.reference_policy) == ("native", "bicubic", 0, "none")
        assert "torch" in json.loads(row.versions) and row.device.startswith("cpu")


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


def test_missing_lpips_weights_stop_the_run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("LMR_HOME", str(tmp_path / "none"))
    result = call(evaluate, "--benchmark", "folder", "--data", data, "--method", "bicubic", "--out", tmp_path / "run")
    assert result.exit_code == 1 and not (tmp_path / "run").exists()
    assert "alexnet-owt-7be5be79.pth is missing; run `lmr weights fetch alexnet`" in result.stderr
    assert "leave LPIPS out: --metrics psnr_rgb,psnr_y,ssim_y" in result.stderr


def test_numbers_of_references_and_tiers(tmp_path: Path, tiny: Path) -> None:
    dataset, out = make_dataset(tmp_path), tmp_path / "run"

    def mrefsr(*arguments: object, code: int = 0) -> Result:
        return run(dataset, out, "--method", "mrefsr", "--weights", tiny, *arguments, benchmark="dataset", code=code)

    # A built dataset needs no --benchmark.
    assert (
        call(
            evaluate, "--data", dataset, "--method", "bicubic", "--metrics", SOME, "--out", tmp_path / "plain"
        ).exit_code
        == 0
    )
    assert [row.benchmark for row in read_results(tmp_path / "plain")] == ["dataset"]

    assert mrefsr("--references", "0..2").stdout.count("mrefsr: 1 rows") == 3
    mrefsr()
    mrefsr("--tiers", "L,M", "--label", "without H")
    mrefsr("--reference-policy", "each", "--label", "each")
    mrefsr("--reference-policy", "best", "--label", "best")
    rows = read_results(out)
    by_label = {label: [row for row in rows if row.label == label] for label in ("mrefsr", "without H", "each", "best")}
    assert [row.n_references for row in by_label["mrefsr"]] == [0, 1, 2, 5]
    assert [row.tiers for row in by_label["without H"]] == ["M,M,L,L"]
    assert [row.tiers for row in by_label["each"]] == ["H", "M", "M", "L", "L"]
    ids = {row.n_references: json.loads(row.reference_ids) for row in by_label["mrefsr"]}
    assert [json.loads(row.reference_ids)[0] for row in by_label["each"]] == ids[5] and ids[2] == ids[5][:2]
    (best,) = by_label["best"]
    assert best.psnr_y == max(row.psnr_y for row in by_label["each"] if row.psnr_y is not None)
    assert json.loads(best.reference_ids)[0] in ids[5] and best.n_references == 1
    one = next(row for row in by_label["mrefsr"] if row.n_references == 1)
    assert one.psnr_y == by_label["each"][0].psnr_y and len({row.psnr_y for row in by_label["each"]}) > 1
    text = call(results, out, "--against", "each").stdout
    assert "mrefsr, 5 references, HML - each" in text and "1 each H,M,L" in text


def test_a_reference_that_was_added_later(tmp_path: Path, tiny: Path) -> None:
    """A row of other references than there are now is made again: nothing measured belongs to the wrong reference."""
    group, out = tmp_path / "sets" / "a", tmp_path / "run"
    group.mkdir(parents=True)
    for number, name in enumerate(("target", "b", "c")):
        (group / f"{name}.png").write_bytes(encode_png(picture(number)[:24, :24]))
    words = ("--method", "mrefsr", "--weights", tiny)
    each = (*words, "--label", "each", "--reference-policy", "each")
    for arguments in (words, each):
        run(tmp_path / "sets", out, *arguments)
    (group / "a.png").write_bytes(encode_png(picture(3)[:24, :24]))
    assert "1 rows, 1 of them new" in run(tmp_path / "sets", out, *words).stdout
    assert "3 rows, 3 of them new" in run(tmp_path / "sets", out, *each).stdout
    run(tmp_path / "sets", tmp_path / "anew", *each)
    assert [row for row in plain(out) if row.label == "each"] == plain(tmp_path / "anew")
    assert "1 rows, 0 of them new" in run(tmp_path / "sets", out, *words).stdout


def test_bad_options(data: Path, tmp_path: Path, tiny: Path) -> None:
    out = tmp_path / "run"
    for arguments, message in (
        (("--reference-policy", "first"), "bicubic takes no reference"),
        (("--tiers", "H"), "have no tiers; leave the option out"),
        (("--method", "masa"), "--weights: masa needs its checkpoint"),
        (("--method", "masa", "--weights", tiny), "holds weights of kind mrefsr, but masa is needed"),
        (("--method", "mrefsr", "--weights", data / "p9"), "no such file; lmr convert-checkpoint or lmr train"),
        (("--weights", tiny), "bicubic has no weights; leave the option out"),
    ):
        result = run(data, out, *arguments, code=1)
        assert message in result.stderr and not out.exists()
    for arguments, message in (
        (("--references", "5..x"), "give a number, such as 5, or a range"),
        (("--references", "3..1"), "give a number, such as 5, or a range"),
        (("--share", "3/2"), "write K/N"),
        (("--metrics", "psnr"), "'psnr' is none of psnr_rgb"),
        (("--metrics", ","), "--metrics names none of psnr_rgb"),
        (("--rescore", out), "leave out --method"),
    ):
        assert message in run(data, out, *arguments, code=2).stderr
    assert "--data is missing" in call(evaluate, "--benchmark", "lmr", "--method", "bicubic").stderr
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    assert "holds something that is not results of lmr evaluate" in run(data, foreign, code=1).stderr
    assert "not a folder of lmr evaluate" in call(results, foreign).stderr


def test_results_of_another_version(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(data, out)
    import pyarrow.parquet as pq

    table = pq.read_table(out / TABLE)
    pq.write_table(table.drop(["lpips_vgg"]), out / TABLE)
    assert "column lpips_vgg is missing; it was written by another version" in call(results, out).stderr
    (out / "evaluation.json").write_text('{"format": "lmr-evaluation", "version": 1}')
    assert "results of version 1, this program reads 2" in call(results, out).stderr
    assert "results of version 1, this program reads 2" in run(data, out, code=1).stderr


def test_extra_files_are_noted(data: Path, tmp_path: Path) -> None:
    (data / "notes.txt").write_text("x")
    assert "1 files belong to no target: notes.txt" in run(data, tmp_path / "run").stderr


def test_forms_of_results(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(data, out)
    run(data, out, "--label", "a,b & c")
    mean = sum(row.psnr_y or 0 for row in read_results(out)) / 8
    found = json.loads(call(results, out, "--json").stdout)
    assert [r["label"] for r in found["runs"]] == ["a,b & c", "bicubic"] and found["published"] == []
    assert found["runs"][0]["means"]["psnr_y"]["mean"] == pytest.approx(mean)
    assert {d["estimate"]["mean"] for d in found["differences"]} == {0.0}
    lines = list(csv.DictReader(io.StringIO(call(results, out, "--csv").stdout)))
    assert lines[0]["label"] == "a,b & c" and float(lines[1]["psnr_y"]) == pytest.approx(mean)
    assert float(lines[0]["psnr_y_low"]) < mean < float(lines[0]["psnr_y_high"])
    assert "| a,b & c | 0 | 4 | 0 |" in call(results, out / TABLE, "--markdown").stdout
    assert r"a,b \& c & 0 & 4 & 0" in call(results, out, "--latex").stdout
    # The same run given twice counts once.
    assert call(results, out, out / TABLE).stdout == call(results, out).stdout


def test_the_real_cufed5_group(shared: Path, tmp_path: Path) -> None:
    data = shared / "data" / "cufed" / "CUFED5"
    for protocol in ("official", "native"):
        run(data, tmp_path / "run", "--protocol", protocol, benchmark="cufed5")
    native, official = read_results(tmp_path / "run")
    assert (official.protocol, native.protocol) == ("official", "native")
    # Padding darkens the LR beside it, so the protocols differ, but a little: the border is cut off.
    assert official.psnr_y is not None and native.psnr_y is not None
    assert 0 < abs(official.psnr_y - native.psnr_y) < 0.05
    text = call(results, tmp_path / "run").stdout
    assert text.count("MRefSR-rec (published)") == 1


def test_the_example_of_the_docs(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pandas code of docs/evaluation.md runs and gives what `lmr results` gives."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    run(data, tmp_path / "RUN")
    run(data, tmp_path / "RUN", "--label", "again")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code, names)
    means = json.loads(call(results, "RUN", "--json").stdout)["runs"]
    found = names["means"].loc[("folder", "native", "again"), "psnr_y"]  # type: ignore[attr-defined]
    assert found == pytest.approx(means[0]["means"]["psnr_y"]["mean"])
    assert (names["gain"] == 0).all()  # type: ignore[attr-defined]
    table = pd.read_parquet("RUN/results.parquet")
    table.loc[table.label == "again", "psnr_y"] += 1
    table.to_parquet("RUN/results.parquet")
    exec(code, names)
    assert names["gain"].to_numpy() == pytest.approx(1)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("label", None, "column label has rows without a value; it was altered"),
        ("psnr_y", "much", "string, not double; it was altered"),
        ("image_id", b"\xff", "binary, not string; it was altered"),
    ],
)
def test_a_table_that_was_altered(data: Path, tmp_path: Path, column: str, value: object, message: str) -> None:
    run(data, tmp_path / "run")
    table = pd.read_parquet(tmp_path / "run" / TABLE)
    table.assign(n_references=table.n_references.astype("int32")).to_parquet(tmp_path / "same.parquet")
    assert read_results(tmp_path / "same.parquet") == read_results(tmp_path / "run")
    table[column] = [value] * len(table)
    table.to_parquet(tmp_path / "other.parquet")
    said = call(results, tmp_path / "other.parquet").stderr
    assert f"other.parquet: column {column} " in said and message in said


def test_settings_decide_the_id(data: Path, tiny: Path) -> None:
    def settings(**changes: object) -> evaluation_plan.Settings:
        values = {
            "benchmark": "folder", "data": data, "split": "test", "protocol": "native", "method": "mrefsr",
            "weights": tiny, "label": None, "count": None, "tiers": [], "policy": None,
        }  # fmt: skip
        return evaluation_plan.make_settings(**(values | changes))  # type: ignore[arg-type]

    first = settings()
    assert first.policy == "all" and first.run_id == settings().run_id
    others = [
        {"protocol": "official"}, {"label": "x"}, {"count": 2}, {"tiers": ["H"]}, {"policy": "first"},
        {"data": data.parent}, {"method": "c2-matching"},
    ]  # fmt: skip
    assert len({first.run_id, *(settings(**other).run_id for other in others)}) == 8
    with pytest.raises(LmrError, match="no such file"):
        settings(weights=Path("nowhere"))
