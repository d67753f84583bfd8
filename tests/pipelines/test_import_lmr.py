"""The published annotation as a dataset: crops as upstream cuts them, and every line that can not be used is told."""

import csv
import io
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result
from PIL import Image as PilImage

from lmr_tools.annotations import GROUP_COLUMNS, PAIR_COLUMNS, Annotation, BadLine, points, read_annotation
from lmr_tools.dataset import read_manifest
from lmr_tools.explanation import explain_group
from lmr_tools.images import encode_png
from lmr_tools.schema import LmrError
from lmr_tools.shards import read_shard
from lmr_tools.turning import ORIENTATION, TURNS
from lmr_tools.verify import verify_dataset
from pipelines.cli import cli

from .small_build import bytes_of, place, view

SIZE = 64
WIDTH, HEIGHT = 160, 120
SCENES = ("0001", "0002", "0003", "5013")  # 0003 is a test scene of the paper


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SCENES x 7 photos `<scene>/<n>.png`; JPEGs of 0002 lie deeper, as MegaDepth keeps them."""
    root = tmp_path_factory.mktemp("megadepth")
    for number, scene in enumerate(SCENES):
        folder = root / scene / ("dense0/imgs" if scene == "0002" else "")
        folder.mkdir(parents=True)
        picture = place(number, 300, 400)
        for k in range(7):
            photo = view(picture, 100 * number + k, height=HEIGHT, width=WIDTH)
            (folder / f"{k}.png").write_bytes(encode_png(photo))
    return root


def group_line(of: str, first: int = 0, **changes: str) -> dict[str, str]:
    names = [f"{(first + k) % 7}.png" for k in range(6)]
    values = dict(zip(("target", "H", "M1", "M2", "L1", "L2"), names, strict=True))
    values |= {f"p{k}": f"({60 + 5 * k}, {50 + 2 * k})" for k in range(6)}
    return {**values, "scene": of, **changes}


def write_csv(path: Path, lines: list[dict[str, str]], columns: tuple[str, ...] = GROUP_COLUMNS) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(lines)
    return path


def import_lmr(annotation: Path, root: Path, out: Path, *more: object) -> Result:
    arguments = ["import-lmr", annotation, root, "--out", out, "--size", SIZE, "--workers", 1, *more]
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def table(out: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(out / "tables" / f"{name}.parquet")


def groups_of(out: Path) -> list:
    return [group for path in sorted((out / "shards").glob("*.tar")) for group in read_shard(path)]


def upstream_crop(path: Path, centre: tuple[int, int]) -> np.ndarray:
    """What the published code cuts: no turning, half a side before and after the centre."""
    pixels = np.asarray(PilImage.open(path).convert("RGB"))
    x, y = centre
    return pixels[y - SIZE // 2 : y + SIZE // 2, x - SIZE // 2 : x + SIZE // 2]


def test_crops_tiers_and_splits_are_as_published(root: Path, tmp_path: Path) -> None:
    lines = [group_line(scene, target) for scene in SCENES for target in (0, 3)]
    annotation = write_csv(tmp_path / "train.csv", lines)
    result = import_lmr(annotation, root, tmp_path / "out")
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    assert verify_dataset(out).problems == ()
    groups = groups_of(out)
    assert len(groups) == len(lines)
    for group in groups:
        folder = (root / group.target_path).parent
        number = int(Path(group.target_path).stem)
        assert (group.target == upstream_crop(root / group.target_path, (60, 50))).all()
        assert [reference.slot for reference in group.references] == ["H", "M1", "M2", "L1", "L2"]
        assert "".join(reference.tier for reference in group.references) == "HMMLL"
        for k, reference in enumerate(group.references, 1):
            path = folder / f"{(number + k) % 7}.png"
            assert root / reference.path == path
            assert (reference.pixels == upstream_crop(path, (60 + 5 * k, 50 + 2 * k))).all()
            assert reference.overlap is None
            assert reference.scale_ratio is None
        assert group.split == ("test" if group.scene == "0003" else "train")
    counts = read_manifest(out)["counts"]
    assert counts["annotations"] == {"lines": 8, "used": 8, "rejected": 0}
    assert counts["photos"]["found"] == counts["photos"]["used"] == 28
    rows = table(out, "groups")
    assert rows["overlap"].isna().all()
    assert set(rows["landing"]) == {"published"}
    assert "as published" in explain_group(out, groups[0].group_id).considered[0].pair.reason
    for command in (["verify", out], ["inspect", out], ["explain", out, groups[0].group_id, "--json"]):
        done = CliRunner().invoke(cli, [str(part) for part in command])
        assert done.exit_code == 0, (command, done.output)
    assert "2-D matches, not" not in (out / "README.md").read_text()


def test_every_unusable_line_is_a_reject_and_counts_add_up(root: Path, tmp_path: Path) -> None:
    good = group_line("0001")
    bad = {
        "missing photo": group_line("0001", 1, M2="gone.png"),
        "crop outside": group_line("0001", 2, p3="(31, 50)"),
        "crop outside below": group_line("5013", 2, p0=f"(60, {HEIGHT - SIZE // 2 + 1})"),
        "photo twice": group_line("0001", 3, L2="3.png"),
        "repeated line": dict(good),
        "contradiction": {**good, "H": good["L1"], "L1": good["H"]},
        "path": group_line("0001", 4, target="../0002/1.png"),
        "code": group_line("0001", 4, p2="__import__('os').system('touch hacked')"),
        "scene": group_line("..", 4),
        "empty": group_line("0001", 4, p5=""),
        "nan": group_line("0001", 4, p5="(nan, 3)"),
        "three": group_line("0001", 4, p5="(1, 2, 3)"),
        "unknown scene": group_line("7777", 4),
    }
    edge = group_line("5013", 5, p0=f"({SIZE // 2}, {SIZE // 2})", p1=f"({WIDTH - SIZE // 2}, {HEIGHT - SIZE // 2})")
    annotation = write_csv(tmp_path / "bad.csv", [good, *bad.values(), edge])
    with annotation.open("a") as file:
        file.write("1.png,2.png\n")
    out = tmp_path / "out"
    result = import_lmr(annotation, root, out)
    assert result.exit_code == 3, result.output
    assert verify_dataset(out).problems == ()
    counts = read_manifest(out)["counts"]
    assert counts["annotations"] == {"lines": len(bad) + 3, "used": 2, "rejected": len(bad) + 1}
    assert sum(counts["groups"].values()) == 2
    rejects = table(out, "rejects")
    lines = rejects[rejects["stage"] == "annotation"].set_index("image_id")
    reasons = [lines.loc[f"line-{number}", "reason"] for number in range(3, 3 + len(bad))]
    assert reasons == [
        *("photo not usable", "crop outside", "crop outside", "photo twice", "repeated line", "contradiction"),
        *["bad line"] * 6,
        "photo not usable",
    ]
    assert lines.loc[f"line-{len(bad) + 4}", "reason"] == "bad line"
    assert "64x64 around (31, 50) leaves 0001/5.png (160x120)" in lines.loc["line-4", "detail"]
    missing = rejects[rejects["reason"] == "missing"]["path"]
    assert {"0001/gone.png", "7777/0.png"} <= set(missing)
    assert not (Path.cwd() / "hacked").exists()


def test_a_turned_photo_gives_the_published_crop_turned(root: Path, tmp_path: Path) -> None:
    """Upstream ignores EXIF; the crop must show the same pixels, turned as the photo is."""
    turned_root = tmp_path / "root"
    for orientation in TURNS:
        scene = turned_root / f"01{orientation:02d}"
        scene.mkdir(parents=True)
        for k in range(7):
            picture = PilImage.fromarray(view(place(orientation, 300, 400), k, height=HEIGHT, width=WIDTH))
            exif = PilImage.Exif()
            exif[ORIENTATION] = orientation
            buffer = io.BytesIO()
            picture.save(buffer, "PNG", exif=exif)
            (scene / f"{k}.png").write_bytes(buffer.getvalue())
    annotation = write_csv(tmp_path / "a.csv", [group_line(f"01{o:02d}") for o in TURNS])
    result = import_lmr(annotation, turned_root, tmp_path / "out")
    assert result.exit_code == 0, result.output
    steps = {1: [], 2: ["h"], 3: ["r", "r"], 4: ["v"], 5: ["t"], 6: ["t", "h"], 7: ["r", "r", "t"], 8: ["t", "v"]}
    moves = {"h": np.fliplr, "v": np.flipud, "r": np.rot90, "t": lambda a: a.transpose(1, 0, 2)}
    for group in groups_of(tmp_path / "out"):
        expected = upstream_crop(turned_root / group.target_path, (60, 50))
        for step in steps[int(group.scene) - 100]:
            expected = moves[step](expected)
        assert (group.target == expected).all(), group.scene


def test_a_scene_that_shares_a_photo_with_a_test_scene_is_left_out(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "root"
    shutil.copytree(root, copy)
    shutil.copy(copy / "0003" / "2.png", copy / "5013" / "2.png")
    annotation = write_csv(tmp_path / "a.csv", [group_line(scene) for scene in SCENES])
    result = import_lmr(annotation, copy, tmp_path / "out")
    assert result.exit_code == 3
    rejects = table(tmp_path / "out", "rejects").query("stage == 'annotation'")
    assert rejects[["image_id", "reason"]].to_numpy().tolist() == [["line-5", "held-out place"]]
    assert "one place with 0003, held out for test" in rejects["detail"].iloc[0]
    assert set(table(tmp_path / "out", "groups")["scene"]) == {"0001", "0002", "0003"}
    assert verify_dataset(tmp_path / "out").problems == ()


def test_pairs_of_the_single_reference_layout(root: Path, tmp_path: Path) -> None:
    lines = [
        # The first centres leave the photo; the second fit; of the third and fourth one more is taken.
        dict(zip(PAIR_COLUMNS, ("0.png", "1.png", "0001", "H", "[(2, 2), (60, 50), (90, 60), (80, 55)]",
                                "[(60, 50), (70, 52), (80, 60), (81, 55)]"), strict=True)),
        dict(zip(PAIR_COLUMNS, ("0.png", "2.png", "0001", "L", "[[60, 50]]", "[[70, 52]]"), strict=True)),
        dict(zip(PAIR_COLUMNS, ("0.png", "3.png", "0001", "X", "[(60, 50)]", "[(70, 52)]"), strict=True)),
        dict(zip(PAIR_COLUMNS, ("0.png", "3.png", "0001", "M", "[(60, 50)]", "[(70, 52), (1, 1)]"), strict=True)),
        dict(zip(PAIR_COLUMNS, ("0.png", "3.png", "0001", "M", "[]", "[]"), strict=True)),
    ]  # fmt: skip
    annotation = write_csv(tmp_path / "pairs.csv", lines, PAIR_COLUMNS)
    result = import_lmr(annotation, root, tmp_path / "out", "--crops-per-pair", 2)
    assert result.exit_code == 3, result.output
    assert verify_dataset(tmp_path / "out").problems == ()
    found = {
        (group.references[0].slot, group.target_x + SIZE // 2, group.references[0].x + SIZE // 2)
        for group in groups_of(tmp_path / "out")
    }
    assert found == {("H", 60, 70), ("H", 90, 80), ("L", 60, 70)}
    details = table(tmp_path / "out", "rejects").query("stage == 'annotation'")["detail"].tolist()
    assert [detail[:12] for detail in details] == ["sim is 'X', ", "pA has 1 poi", "'[]' is not "]


def test_validation_scenes_and_order_come_from_the_seed(root: Path, tmp_path: Path) -> None:
    annotation = write_csv(tmp_path / "a.csv", [group_line(scene, k) for scene in SCENES for k in range(3)])
    assert import_lmr(annotation, root, tmp_path / "a", "--val-share", 0.3).exit_code == 0
    assert import_lmr(annotation, root, tmp_path / "b", "--val-share", 0.3, "--workers", 2).exit_code == 0
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    splits = table(tmp_path / "a", "groups").drop_duplicates("scene").set_index("scene")["split"]
    assert splits["0003"] == "test"
    assert sorted(splits.drop("0003")) == ["train", "train", "val"]
    assert "holds a dataset already" in import_lmr(annotation, root, tmp_path / "a").output


def test_an_imported_dataset_is_rebuilt_to_the_same_bytes(root: Path, tmp_path: Path) -> None:
    annotation = write_csv(tmp_path / "a.csv", [group_line(scene) for scene in SCENES] + [group_line("nowhere")])
    import_lmr(annotation, root, tmp_path / "a")
    arguments = ["rebuild", tmp_path / "a", "--source", root, "--out", tmp_path / "b", "--workers", 1]
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "its columns are none"),
        (b"target,H,M1\n", "its columns are target, H, M1"),
        (b"\xff\xfe\x00\x00", "not a CSV file"),
        (",".join(GROUP_COLUMNS).encode(), "a header and no lines"),
    ],
)
def test_a_file_that_is_no_annotation_is_refused(root: Path, tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    result = import_lmr(tmp_path / "a.csv", root, tmp_path / "out")
    assert result.exit_code == 1
    assert reason in result.output


def test_the_row_numbers_of_pandas_are_skipped(tmp_path: Path) -> None:
    frame = pd.DataFrame([group_line("0001"), group_line("0002")])
    frame.to_csv(tmp_path / "with.csv")
    frame[list(GROUP_COLUMNS[::-1])].to_csv(tmp_path / "without.csv", index=False)
    assert read_annotation(tmp_path / "with.csv") == read_annotation(tmp_path / "without.csv")
    layout, lines = read_annotation(tmp_path / "with.csv")
    assert layout == "groups"
    assert not any(isinstance(line, BadLine) for line in lines)
    assert all(isinstance(line, Annotation) and line.centres[0][0] == (60, 50) for line in lines)


def test_points_are_read_by_pattern() -> None:
    assert points("(1, 2)") == [(1, 2)]
    assert points(" [ (1,2), [3 , 4],(5.4, -6.5) ]") == [(1, 2), (3, 4), (5, -6)]
    for text in ("", "1, 2", "(1, 2", "(1 2)", "f(1, 2)", "(1, 2) or 3", "(1e9, 2)", "(0x1, 2)", "[(1, 2)] * 99"):
        with pytest.raises(ValueError, match="is not a point"):
            points(text)
    with pytest.raises(LmrError, match="can not be read"):
        read_annotation(Path("no-such-file.csv"))
