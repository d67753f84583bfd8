"""Means, bootstrap intervals and paired differences; tables of text; published numbers."""

import dataclasses
import math

import numpy as np
import pytest

from lmr_tools.comparison import differences, estimate, summarise
from lmr_tools.published import IMAGES, published_results
from lmr_tools.result_tables import Table, as_latex, as_markdown, as_text, tables_of
from lmr_tools.schema import LmrError, ResultRow

ROW = ResultRow(
    run_id="a", label="one", benchmark="cufed5", protocol="official", method="bicubic", weights_sha256=None,
    image_id="001", target_sha256="t", reference_policy="none", n_references=0, reference_ids="[]", tiers="",
    psnr_rgb=20.0, psnr_y=22.0, ssim_y=0.5, lpips_alex=None, lpips_vgg=None,
    seconds=1.0, peak_memory_mb=10.0, device="cpu", versions="{}",
    sr="x.png", failure=None,
)  # fmt: skip


def run(run_id: str, values: list[float], **changes: object) -> list[ResultRow]:
    return [
        dataclasses.replace(ROW, run_id=run_id, label=run_id, image_id=f"{i:03}", psnr_y=value, **changes)  # type: ignore[arg-type]
        for i, value in enumerate(values)
    ]


def test_interval_of_a_mean_is_that_of_the_normal_law() -> None:
    values = np.random.default_rng(0).normal(30, 2, 400)
    found = estimate(values.tolist())
    error = values.std() / math.sqrt(len(values))
    assert found.mean == pytest.approx(values.mean(), abs=1e-12) and found.images == 400
    assert found.low == pytest.approx(found.mean - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(found.mean + 1.96 * error, abs=0.1 * error)
    assert estimate(values.tolist()) == found


def test_kept_draws_give_what_fresh_ones_give(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(30, 2, 37).tolist()
    kept = estimate(values)
    monkeypatch.setattr("lmr_tools.comparison.KEPT", 0)
    fresh = estimate(values)
    assert (kept.low, kept.high) == pytest.approx((fresh.low, fresh.high), abs=1e-9)


def test_intervals_that_can_not_be_known() -> None:
    assert estimate([3.0]).low is None
    infinite = estimate([3.0, math.inf])
    assert infinite.mean == math.inf and infinite.low is infinite.high is None
    constant = estimate([3.0, 3.0, 3.0])
    assert constant.low == constant.high == 3.0


def test_pictures_of_one_name_are_the_same_only_with_the_same_pixels() -> None:
    mine, yours = run("mine", [20.0, 21.0]), run("yours", [30.0, 31.0], target_sha256="other")
    partly = [*run("partly", [22.0], target_sha256="t"), *run("partly", [9.0, 32.0], target_sha256="other")[1:]]
    unread = run("unread", [0.0], target_sha256=None, failure="broken")
    summaries = summarise([*mine, *yours, *partly, *unread])
    assert [summary.testset for summary in summaries] == ["cufed5", "cufed5 (2)", "cufed5", "cufed5"]
    pairs = [pair for pair in differences([*mine, *yours, *partly]) if pair.metric == "psnr_y"]
    assert [(pair.label, pair.estimate.mean, pair.estimate.images) for pair in pairs] == [("partly", 2.0, 1)]
    titles = [table.title for table in tables_of(summaries, pairs)]
    assert titles[-1] == "cufed5 (2), official protocol" and len(titles) == 3


def test_pairing_sees_what_the_means_hide() -> None:
    hard = np.random.default_rng(1).normal(28, 4, 60)
    better = hard + np.random.default_rng(2).normal(0.2, 0.1, 60)
    rows = run("base", hard.tolist()) + run("new", better.tolist())
    base, new = (summary.means["psnr_y"] for summary in summarise(rows))
    assert base.high is not None and new.low is not None and base.high > new.low
    (pair,) = [pair for pair in differences(rows) if pair.metric == "psnr_y"]
    assert pair.label == "new" and pair.against_label == "base" and pair.estimate.images == 60
    assert pair.estimate.low is not None and pair.estimate.low > 0.1
    assert pair.estimate.mean == pytest.approx((better - hard).mean(), abs=1e-9)
    (other,) = [pair for pair in differences(rows, against="new") if pair.metric == "psnr_y"]
    assert other.estimate.mean == -pair.estimate.mean and other.label == "base"


def test_runs_of_one_label_are_told_apart() -> None:
    bicubic = run("bicubic", [20.0, 21.0], n_references=0)
    two = [*run("b", [22.0, 22.0], n_references=0), *run("c", [23.0, 24.0], n_references=1, tiers="H")]
    rows = [*bicubic, *(dataclasses.replace(row, label="tiny") for row in two)]
    _, table = tables_of(summarise(rows), differences(rows, "bicubic"))
    assert [row[0] for row in table.rows] == ["tiny, 0 references - bicubic", "tiny, 1 reference, H - bicubic"]


def test_only_common_pictures_are_paired() -> None:
    rows = run("a", [20.0, 21.0, 22.0]) + run("b", [30.0, 40.0])
    rows[4] = dataclasses.replace(rows[4], failure="broken", psnr_y=None)
    first, second = summarise(rows)
    assert (first.images, first.failed, second.images, second.failed) == (3, 0, 1, 1)
    (pair,) = [pair for pair in differences(rows) if pair.metric == "psnr_y"]
    assert pair.estimate.images == 1 and pair.estimate.mean == 10.0
    perfect = run("a", [math.inf]) + run("b", [math.inf])
    assert [pair.estimate.mean for pair in differences(perfect) if pair.metric == "psnr_y"] == [0.0]


def test_runs_of_other_protocols_are_not_compared() -> None:
    rows = run("a", [20.0]) + run("b", [21.0], protocol="native")
    assert differences(rows) == []
    with pytest.raises(LmrError, match="--against c: no run has this label or id; there are a, b"):
        differences(rows, against="c")


def test_a_picture_with_several_rows_counts_once() -> None:
    each = [
        dataclasses.replace(ROW, reference_policy="each", n_references=1, reference_ids=f'["{i}"]', psnr_y=20.0 + i)
        for i in range(3)
    ]
    (summary,) = summarise(each + [dataclasses.replace(row, image_id="002", psnr_y=31.0) for row in each[:1]])
    assert summary.images == 2 and summary.means["psnr_y"].mean == 26.0
    assert summary.references == "1" and summary.policy == "each"


def test_two_results_of_one_picture_are_not_averaged() -> None:
    once, again = run("a", [20.0, 21.0]), run("a", [20.0, 21.0], seconds=9.0, ssim_y=None)
    (summary,) = summarise(once + again)
    assert summary.images == 2 and summary.means["psnr_y"].mean == 20.5
    with pytest.raises(LmrError, match=r"run a \(a\): 001 has two results; give one of the folders"):
        summarise(once + run("a", [20.0, 21.5]))
    assert summarise(once + run("a", [0.0, 0.0], failure="broken"))[0].failed == 2


def test_published_numbers() -> None:
    assert published_results("cufed5", "official")["MRefSR-rec"] == (28.94, 0.860)
    assert published_results("lmr", "official")["GeoRef-rec (2026)"] == (31.84, 0.896)
    assert published_results("sun80", "official")["RCAN"] == (29.86, 0.810)
    assert "RCAN" not in published_results("wr-sr", "official")
    assert published_results("cufed5", "native") == published_results("folder", "official") == {}
    assert {len(published_results(name, "official")) for name in IMAGES} == {13, 14}


def test_published_numbers_stand_where_they_agree() -> None:
    official, native = run("a", [20.0]), run("b", [21.0], protocol="native")
    first, second = tables_of(summarise(official + native), [])
    assert ("MRefSR-rec (published)", "-", "126", "-", "-", "28.94", "0.860", "-") in first.rows
    assert any("over all 126 pictures" in note for note in first.notes)
    assert [row[0] for row in second.rows] == ["b"]
    (without, _) = tables_of(summarise(official + native), [], published=False)
    assert [row[0] for row in without.rows] == ["a"]


def test_a_reference_chosen_by_the_result_is_called_an_upper_bound() -> None:
    first, best = run("a", [20.0], reference_policy="first"), run("b", [21.0], reference_policy="best")
    assert any("an upper bound, not a result" in note for note in tables_of(summarise(first + best), [])[0].notes)
    assert not any("upper bound" in note for note in tables_of(summarise(first), [])[0].notes)


def test_control_characters_of_a_label_are_shown_not_sent() -> None:
    rows = [dataclasses.replace(ROW, run_id=label, label=label) for label in ("\x1b[2Ja", "b\n")]
    tables = tables_of(summarise(rows), differences(rows))
    assert [table.rows[0][0] for table in tables] == [r"\x1b[2Ja", r"b\n - \x1b[2Ja"]


def test_forms_of_a_table() -> None:
    table = Table(title="t_1", header=("name", "n"), rows=(("a_b|c & 50%", "1"), ("x", "22")), notes=("why",))
    text = as_text(table).splitlines()
    assert text[2] == "name         n" and text[4] == "a_b|c & 50%  1" and text[-1] == "why"
    assert "| a_b\\|c & 50% | 1 |" in as_markdown(table)
    latex = as_latex(table)
    assert r"a\_b\textbar{}c \& 50\% & 1 \\" in latex and latex.count("tabular") == 2
    assert as_latex(dataclasses.replace(table, rows=(("\\x{~^", "1"),))).splitlines()[-3] == (
        r"\textbackslash{}x\{\textasciitilde{}\textasciicircum{} & 1 \\"
    )
