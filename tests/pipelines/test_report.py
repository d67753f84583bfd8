"""`lmr report`: what the page says against the tables, what hostile names do, and the page in a real browser."""

import base64
import dataclasses
import hashlib
import html
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from lmr_tools.comparison import summarise
from lmr_tools.images import decode, downscale, encode_png
from lmr_tools.metrics import luma
from lmr_tools.report import Options, write_report
from lmr_tools.report_charts import Measured, against_cost, against_references, against_tiers
from lmr_tools.report_figures import crop_place, ranking
from lmr_tools.results import TABLE, read_results
from lmr_tools.schema import ResultRow
from lmr_tools.tables import write_rows
from pipelines.cli import Commands
from pipelines.evaluate import evaluate
from pipelines.report import report
from tests.lmr_tools.test_comparison import ROW
from tests.pipelines.browser import browser
from tests.pipelines.test_evaluate import SOME, picture

EVIL = "</script><script>window.hacked=1</script>"
EVIL_FILE = "'\"><img src=x onerror=window.hacked=1> ‮gpj.png"


def call(*arguments: object, code: int = 0) -> Result:
    group = Commands("lmr", commands={"evaluate": evaluate, "report": report})
    result = CliRunner().invoke(group, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A test set of four targets with references, one of them broken and one of a hostile name; RUN of two methods."""
    place = tmp_path_factory.mktemp("report")
    data, run = place / "data", place / "run"
    for number, name in enumerate(["a1", "a2", "b10", EVIL_FILE]):
        folder = data / name
        folder.mkdir(parents=True)
        (folder / "target.png").write_bytes(encode_png(picture(number, 64, 80)))
        (folder / "H.png").write_bytes(encode_png(picture(number + 20, 64, 60)))
        (folder / "L<b>.png").write_bytes(encode_png(picture(number + 30, 40, 60)))
    (data / "a2" / "target.png").write_bytes(b"not a picture")
    for label in ("bicubic", EVIL):
        call(
            "evaluate", "--benchmark", "folder", "--data", data, "--method", "bicubic", "--metrics", SOME, "--label",
            label, "--out", run, code=3,
        )  # fmt: skip
    # The second method is better where the row says so: its pictures are the targets, but for a patch.
    for row in read_results(run):
        if row.label == EVIL and row.sr:
            sr = decode((data / row.image_id / "target.png").read_bytes()).copy()
            sr[20:40, 40:60] //= 2
            (run / row.sr).write_bytes(encode_png(sr))
    call("evaluate", "--rescore", run, "--metrics", SOME, code=3)
    return data, run


def test_the_page_is_one_file_and_its_policy_allows_our_code_alone(made: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    done = json.loads(call("report", made[1], "-o", out, "--json", "--note", "a <demo>").stdout)
    page = out.read_text(encoding="utf-8")
    assert done["runs"] == 2 and done["figures"] == 3 and done["bytes"] == len(page.encode())
    assert EVIL not in page and "<img src=x" not in page and "a &lt;demo&gt;" in page
    # Text that turns the direction of reading is shown, not obeyed.
    assert "‮" not in page and "\\u202e" in page
    for kind in ("style", "script"):
        (code,) = re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.S)
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in page
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy and "default-src 'none'" in policy[1] and "unsafe" not in policy[1]
    assert set(re.findall(r"<script[^>]*>", page)) == {"<script>", '<script type="application/json" id="data1">'}
    assert not re.search(r'(src|href)="(?!data:|#)', page) and "style=" not in page and "http://" not in page
    again = tmp_path / "again.html"
    call("report", made[1], "-o", again, "--note", "a <demo>")
    assert again.read_bytes() == out.read_bytes()


def test_numbers_of_the_page_are_those_of_the_table(made: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    call("report", made[1], "-o", out)
    page = out.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data1">(.*?)</script>', page, re.S)
    assert found
    data = json.loads(found[1])
    by_run = {label: {} for label in data["runs"]}  # type: ignore[var-annotated]
    for row in read_results(made[1]):
        by_run[row.label][row.image_id] = row
    assert data["images"][:3] == ["'\"><img src=x onerror=window.hacked=1> \\u202egpj.png", "a1", "a2"]
    ids = [EVIL_FILE, "a1", "a2", "b10"]
    for metric, digits in (("psnr_y", 3), ("ssim_y", 5)):
        for label, values in zip(data["runs"], data["values"][metric], strict=True):
            for image, value in zip(ids, values, strict=True):
                true = getattr(by_run[label][image], metric)
                assert value == (None if true is None else round(true, digits))
    assert [sorted(each) for each in data["failures"]] == [[], [], ["0", "1"], []]
    mean = summarise(read_results(made[1]))[0].means["psnr_y"]
    assert f"<span>{mean.mean:.2f}</span><small>{mean.low:.2f} to {mean.high:.2f}</small>" in page
    assert "not an image" in page and "2 rows without numbers" in page


def test_the_crop_is_where_the_pictures_differ_most() -> None:
    random = np.random.default_rng(3)
    target = random.integers(0, 256, (72, 92, 3), dtype=np.uint8)
    pictures = [random.integers(0, 256, target.shape, dtype=np.uint8) // divisor for divisor in (1, 3, 2)]
    planes = np.stack([luma(each) for each in pictures])
    x, y, side = crop_place(target, pictures)
    assert side == 36 and x % 4 == y % 4 == 0
    scores = {
        (left, top): planes[:, top : top + side, left : left + side].std(axis=0).mean()
        for top in range(0, 72 - side + 1, 4)
        for left in range(0, 92 - side + 1, 4)
    }
    assert scores[x, y] == pytest.approx(max(scores.values()), abs=1e-6)
    alone = target.copy()
    alone[40:60, 60:80] ^= 255
    x, y, _ = crop_place(target, [alone])
    assert 40 - 16 <= y <= 40 and 60 - 16 <= x <= 60


def test_figures_show_the_pixels_that_were_measured(made: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    call("report", made[1], "-o", out)
    page = out.read_text(encoding="utf-8")
    figure = re.search(r'aria-label="Figure of b10".*?</article>', page, re.S)
    assert figure
    place = re.search(r"80x64, crop (\d+)x\d+ at (\d+), (\d+)", figure[0])
    assert place
    side, x, y = (int(value) for value in place.groups())
    crops = [decode(base64.b64decode(data)) for data in re.findall(r"data:image/png;base64,([^\"]*)", figure[0])]
    target = picture(2, 64, 80)
    box = slice(y, y + side), slice(x, x + side)
    np.testing.assert_array_equal(crops[0], target[box])
    np.testing.assert_array_equal(crops[1], downscale(target)[y // 4 : (y + side) // 4, x // 4 : (x + side) // 4])
    rows = {row.label: row for row in read_results(made[1]) if row.image_id == "b10"}
    for crop, label in zip(crops[2:], (EVIL, "bicubic"), strict=True):
        np.testing.assert_array_equal(crop, decode((made[1] / str(rows[label].sr)).read_bytes())[box])
    assert figure[0].count('<b class="tierH">H</b>') == 1 and "Reference L&lt;b&gt;.png" in figure[0]


def test_the_base_comes_first_in_figures(made: tuple[Path, Path], tmp_path: Path) -> None:
    def names(against: str) -> list[str]:
        out = tmp_path / "report.html"
        call("report", made[1], "-o", out, "--against", against)
        return re.findall('data-name="([^"]*)"', out.read_text())[:4]

    hostile = html.escape(EVIL)
    assert names("bicubic") == ["GT", "LR", "bicubic", hostile] and names(EVIL) == ["GT", "LR", hostile, "bicubic"]


def test_pictures_that_are_gone(made: tuple[Path, Path], tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(made[0], data)
    shutil.copytree(made[1], run)
    out = tmp_path / "report.html"
    # The folder of the settings is still there; with --data it is another one.
    (data / "a1" / "target.png").write_bytes(encode_png(picture(50, 64, 80)))
    shutil.rmtree(data / "b10")
    done = json.loads(call("report", run, "-o", out, "--data", data, "--json").stdout)
    assert done["figures"] == 1
    assert any(note.startswith("a1: its target is not the picture any more") for note in done["notes"])
    assert any(note.startswith("b10: not in the test set's folder") for note in done["notes"])
    shutil.rmtree(run / "images")
    done = json.loads(call("report", run, "-o", out, "--json").stdout)
    assert done["figures"] == 0 and any("SR picture of bicubic is left out (No such file" in n for n in done["notes"])
    done = json.loads(call("report", run, "-o", out, "--data", tmp_path / "nowhere", "--json").stdout)
    assert done["figures"] == 0 and any("nowhere: no such folder" in note for note in done["notes"])
    shutil.copy(run / TABLE, tmp_path / "alone.parquet")
    done = json.loads(call("report", tmp_path / "alone.parquet", "-o", out, "--json").stdout)
    assert done["figures"] == 0 and "only tables were given" in done["notes"][0] and "only tables" in out.read_text()


def test_a_table_can_not_reach_files_outside_its_folder(made: tuple[Path, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(made[1], run)
    shutil.copy(made[0] / "b10" / "target.png", tmp_path / "secret.png")
    rows = [dataclasses.replace(row, sr="../secret.png" if row.sr else None) for row in read_results(run)]
    write_rows(run / TABLE, rows, ResultRow)
    done = json.loads(call("report", run, "-o", tmp_path / "r.html", "--json").stdout)
    assert done["figures"] == 0 and any("lies outside of its folder" in note for note in done["notes"])


def test_options(made: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert "--only x: no run has this label" in call("report", made[1], "-o", out, "--only", "x", code=1).stderr
    assert "--against x: no run has this label" in call("report", made[1], "-o", out, "--against", "x", code=1).stderr
    assert "not a folder of lmr evaluate" in call("report", tmp_path, "-o", out, code=1).stderr
    assert not out.exists()
    call("report", made[1], "-o", out, "--only", "bicubic", "--figures", "2")
    page = out.read_text(encoding="utf-8")
    assert "2 of 4 pictures, spread from the worst to the best" in page and "1 of 3, 1 is the worst" in page
    assert "picture by picture" not in page
    done = write_report([made[1]], out, Options(room=100))
    assert done["figures"] == 0 and any("0 of 3 figures fit" in note for note in done["notes"])
    call("report", made[1], "-o", out, "--figures", "0")
    assert "There are no figures." in out.read_text()


def rows_of(label: str, values: list[float], **changes: object) -> list[ResultRow]:
    return [
        dataclasses.replace(ROW, run_id=f"{label}{changes}", label=label, image_id=f"{i:04}", psnr_y=value, **changes)  # type: ignore[arg-type]
        for i, value in enumerate(values)
    ]


def test_many_runs_and_pictures_stay_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    rows = [row for n in range(30) for row in rows_of(f"m{n:02}", random.normal(28, 3, 1000).tolist())]
    write_rows(tmp_path / "r.parquet", rows, ResultRow)
    call("report", tmp_path / "r.parquet", "-o", tmp_path / "r.html")
    assert (tmp_path / "r.html").stat().st_size < 3_000_000
    monkeypatch.setattr("lmr_tools.report_tables.PICTURES", 200)
    big = rows_of("one", random.normal(28, 3, 250).tolist()) + rows_of("two", random.normal(28, 3, 250).tolist())
    write_rows(tmp_path / "b.parquet", big, ResultRow)
    call("report", tmp_path / "b.parquet", "-o", tmp_path / "b.html")
    data = json.loads(re.findall(r'id="data1">(.*?)</script>', (tmp_path / "b.html").read_text(), re.S)[0])
    assert data["total"] == 250 and len(data["images"]) == 200
    one, two = ({row.image_id: row.psnr_y or 0 for row in big if row.label == label} for label in ("one", "two"))
    spread = sorted(one, key=lambda image: -abs(one[image] - two[image]))
    assert set(data["images"]) == set(spread[:200])


def test_ranking() -> None:
    one, two = rows_of("a", [20.0, 25.0, 30.0, 40.0]), rows_of("b", [21.0, 29.0, 30.5, float("inf")])
    assert [key[0] for key, _ in ranking([one, two])] == ["0001", "0000", "0002"]
    alone = [(key[0], why) for key, why in ranking([rows_of("a", [30.0, 20.0, 25.0, 22.0, 28.0])])]
    assert [name for name, _ in alone][:3] == ["0001", "0000", "0002"] and alone[0][1] == "1 of 5, 1 is the worst"
    assert len(alone) == 5 and ranking([]) == []


def measured(*runs: list[ResultRow], tiers: tuple[tuple[str, ...], ...] = ()) -> list[Measured]:
    return [
        Measured(number=n + 1, summary=summarise(run)[0], rows=run, only_tiers=tiers[n] if tiers else ())
        for n, run in enumerate(runs)
    ]


def test_chart_of_references() -> None:
    base = rows_of("bicubic", [20.0, 22.0, 99.0])
    few = rows_of("m", [22.0, 24.0], n_references=1, reference_policy="all")
    many = rows_of("m", [25.0, 27.0], n_references=5, reference_policy="all")
    chart = against_references(measured(base, many, few))
    assert chart is not None and "2 pictures" in chart.note  # the third has no other result
    by_name = {series.name: series for series in chart.series}
    assert [mark.tag for mark in by_name["m"].marks] == ["3", "2"] and by_name["m"].line and not by_name["bicubic"].line
    ys = [by_name["bicubic"].marks[0].y, *(mark.y for mark in by_name["m"].marks)]  # 21, 23, 26 dB
    assert (ys[1] - ys[0]) / (ys[2] - ys[0]) == pytest.approx(2 / 5, abs=0.01) and ys[2] < ys[0]
    xs = [by_name["bicubic"].marks[0].x, *(mark.x for mark in by_name["m"].marks)]
    assert (xs[1] - xs[0]) / (xs[2] - xs[0]) == pytest.approx(1 / 5, abs=0.01)
    assert against_references(measured(base, few)) is None
    # A run with a choice of tiers is not one with fewer references.
    assert against_references(measured(base, many, few, tiers=((), (), ("H",)))) is None


def test_chart_of_tiers_is_over_common_pictures() -> None:
    high = rows_of("m", [30.0, 10.0], tiers="H", n_references=1, reference_policy="all")
    low = rows_of("m", [26.0], tiers="L,L", n_references=2, reference_policy="all")
    chart = against_tiers(measured(high, low, tiers=(("H",), ("L",))))
    assert chart is not None and "the 1 pictures" in chart.note
    assert [mark.text for mark in chart.series[0].marks] == [
        "m: High references alone, 30.00 dB",
        "m: Low references alone, 26.00 dB",
    ]
    assert against_tiers(measured(high, tiers=(("H",),))) is None
    # Without the settings nothing is known of what was chosen.
    assert against_tiers(measured(high, low)) is None


def test_chart_of_cost() -> None:
    runs = [rows_of(f"m{n}", [20.0 + n], seconds=10.0**n, peak_memory_mb=100.0 + n) for n in range(4)]
    time, memory = against_cost(measured(*runs))
    xs = [series.marks[0].x for series in time.series]
    np.testing.assert_allclose(np.diff(xs), np.diff(xs)[0], atol=0.2)  # a logarithmic axis
    assert [text for _, text in time.x_ticks] == ["1", "10", "100", "1000"]
    assert "1 references" not in memory.note and "Measured on cpu" in memory.note
    assert against_cost(measured(runs[0])) == []


def test_the_page_in_a_browser(made: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    call("report", made[1], "-o", out, "--against", "bicubic")
    with browser(tmp_path / "profile") as page:
        page.get(out.as_uri())
        run = page.execute_script
        assert run("return window.hacked") is None and run("return document.querySelectorAll('.figure').length") == 3

        def names() -> list[str]:
            return run("return [...document.querySelectorAll('.pictures tbody th')].map(e => e.textContent)")  # type: ignore[no-any-return]

        # Sorting: by name as people do, then by the first run's numbers, missing ones last both ways.
        assert [name for name in names() if name[0] != "'"] == ["a1", "a2", "b10"]
        values = {row.image_id: row.psnr_y for row in read_results(made[1]) if row.label == "bicubic" and row.psnr_y}
        headings = page.find_elements("css selector", ".pictures thead .sort")
        column = next(n for n, each in enumerate(headings) if each.text == "bicubic")
        shown = {"a1": "a1", "b10": "b10", "'": EVIL_FILE}

        def order() -> list[str]:
            return [shown.get(name if name[0] != "'" else "'", name) for name in names()]

        headings[column].click()
        assert order() == [*sorted(values, key=lambda name: -values[name]), "a2"]
        page.find_elements("css selector", ".pictures thead .sort")[column].click()
        assert order() == [*sorted(values, key=lambda name: values[name]), "a2"]
        assert page.find_element("css selector", ".pictures td.none").text == "failed"
        # The leaderboard sorts too, with the keyboard.
        first = "return document.querySelector('.sortable tbody th').textContent"
        page.find_elements("css selector", ".sortable .sort")[1].send_keys("\ue007")
        assert run(first) == "bicubic"
        page.find_elements("css selector", ".sortable .sort")[1].send_keys("\ue007")
        assert EVIL in run(first)
        # Filter.
        page.find_element("css selector", ".filter").send_keys("A")
        assert all("a" in name.lower() for name in names()) and "b10" not in names()
        page.find_element("css selector", ".failed").click()
        assert names() == ["a2"] and "1 of 4" in page.find_element("css selector", ".count").text
        # Slider: with the keyboard, and by dragging on the picture.
        slide, over = (page.find_element("css selector", f".compare {name}") for name in (".slide", ".over"))
        before = over.value_of_css_property("clip-path")
        slide.send_keys("\ue014" * 20)
        assert slide.get_property("value") == "70" and over.value_of_css_property("clip-path") != before
        stage = page.find_element("css selector", ".stage")
        from selenium.webdriver import ActionChains

        ActionChains(page).move_to_element(stage).click().perform()
        assert 48 <= float(slide.get_property("value")) <= 52
        pictures = run("return ['.over', '.under'].map(s => document.querySelector('.compare ' + s).src.slice(0, 5))")
        assert pictures == ["data:", "data:"]
        # Zoom: opens, goes on to the next crop, grows, closes.
        page.find_element("css selector", ".tile").click()
        title, factor = (page.find_element("css selector", f"#zoom {part}") for part in ("strong", "output"))
        assert title.text == "GT"
        size = factor.text
        keys = page.switch_to.active_element
        keys.send_keys("\ue014", "-")
        assert title.text == "LR" and factor.text != size
        keys.send_keys("\ue00c")
        assert run("return document.getElementById('zoom').open") is False
        page.find_element("css selector", "#theme").click()
        assert run("return document.documentElement.dataset.theme") in ("dark", "light")
        # A phone: nothing is wider than the screen.
        page.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": 380, "height": 800, "deviceScaleFactor": 2, "mobile": True}
        )
        assert run("return document.documentElement.scrollWidth") <= 380
        assert page.get_log("browser") == []
        events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
        # The browser's own first tab asks for things too.
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        asked = {each["request"]["url"] for each in sent if each["documentURL"] == out.as_uri()}
        assert {url for url in asked if not url.startswith("data:")} == {out.as_uri()}
