"""`lmr evaluate` and `lmr results`: rows against the metrics by hand, options, tables, forms of results."""

import csv
import dataclasses
import io
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import Result

from lmr_tools import metrics
from lmr_tools.images import decode, downscale, encode_png, upscale
from lmr_tools.results import TABLE, read_results
from lmr_tools.schema import LmrError
from lmr_tools.testset_layouts import LAYOUTS
from mrefsr import evaluation, evaluation_plan, systems
from mrefsr.checkpoints import save_model
from mrefsr.config import MODEL_PRESETS
from mrefsr.model import MRefSR
from pipelines import evaluate as module
from pipelines.evaluate import evaluate
from pipelines.results import results
from tests.lmr_tools.dataset_fixture import make_dataset
from tests.pipelines.evaluate_fixture import SOME, call, picture, plain, run, write_pictures


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "pictures")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MRefSR of random weights: a stand-in for a trained one."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    # Matches that are not refined: else made-up references, which agree with nothing, would be refused.
    save_model(path, MRefSR(dataclasses.replace(MODEL_PRESETS["mrefsr-tiny"], refine_matches=False)), {})
    return path


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
