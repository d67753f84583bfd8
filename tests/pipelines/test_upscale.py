"""`lmr upscale`, from files to files. The weights are a random stand-in: what is tested is all around them."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image as PilImage
from PIL import ImageCms

from lmr_tools.images import decode, encode_png
from lmr_tools.schema import LmrError
from mrefsr.checkpoints import Checkpoint, load_model, save_checkpoint, save_model
from mrefsr.infer import super_resolve
from mrefsr.methods.esrgan import RRDBNet
from pipelines import upscale as module
from pipelines.upscale import upscale
from pipelines.upscale_jobs import references_of
from tests.mrefsr.test_model import TINY, picture, random_model

Image = npt.NDArray[np.uint8]


def photo(height: int, width: int, seed: int) -> Image:
    return np.asarray((picture(height, width, seed).permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())


def write(path: Path, image: Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_png(image))
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "random-stand-in.safetensors"
    save_model(path, random_model(TINY), {"weights": "random stand-in"})
    return path


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """One LR picture and two references."""
    write(tmp_path / "lr.png", photo(9, 11, 0))
    write(tmp_path / "a.png", photo(36, 44, 1))
    write(tmp_path / "b.png", photo(50, 33, 2))
    return tmp_path


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Three targets; the references of two lie in a folder, of one beside it, of one both."""
    for number, name in enumerate(("cat", "cat_two", "dog")):
        write(tmp_path / "targets" / f"{name}.png", photo(8, 9 + number, number))
    write(tmp_path / "refs" / "cat" / "x.png", photo(30, 30, 11))
    write(tmp_path / "refs" / "cat_1.png", photo(32, 28, 12))
    write(tmp_path / "refs" / "cat_two_1.png", photo(32, 24, 13))
    write(tmp_path / "refs" / "dog" / "y.png", photo(24, 24, 14))
    (tmp_path / "refs" / "notes.txt").write_text("no picture")
    (tmp_path / "targets" / "notes.txt").write_text("no picture")
    return tmp_path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(upscale, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    """The one line of an expected failure, which the group of commands prints."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, LmrError), result.exception
    assert "\n" not in str(result.exception)
    return str(result.exception)


def pixels(path: Path) -> Image:
    return decode(path.read_bytes())


def expected(weights: Path, target: Path, references: Sequence[Path]) -> Image:
    return super_resolve(load_model(weights), pixels(target), [pixels(path) for path in references])


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_one_picture(files: Path, weights: Path) -> None:
    lr, a, b, out = files / "lr.png", files / "a.png", files / "b.png", files / "out.png"
    result = run(lr, "--ref", a, "--ref", b, "--weights", weights, "-o", out, "--matches", files / "m.png")
    assert result.exit_code == 0, result.output
    assert f"{out}: 44x36 with 2 references in" in result.stderr
    assert np.array_equal(pixels(out), expected(weights, lr, [a, b]))
    assert pixels(files / "m.png").shape[1] > 1000  # two panels
    assert sorted(listing(files)) == ["a.png", "b.png", "lr.png", "m.png", "out.png"]


def test_a_folder_of_references_and_options(files: Path, weights: Path) -> None:
    (files / "refs").mkdir()
    for name in ("a.png", "b.png"):
        (files / name).rename(files / "refs" / name)
    lr, out = files / "lr.png", files / "out.png"
    options = ("--tile", "8", "--dtype", "bf16", "--device", "cpu", "--max-reference-side", "20")
    assert run(lr, "--ref", files / "refs", "--weights", weights, "-o", out, *options).exit_code == 0
    model, references = load_model(weights), [pixels(files / "refs" / name) for name in ("a.png", "b.png")]
    same = super_resolve(model, pixels(lr), references, tile=8, dtype=torch.bfloat16, max_reference_side=20)
    assert np.array_equal(pixels(out), same)
    assert "exists already" in refused(lr, "--ref", files / "refs", "--weights", weights, "-o", out)
    assert run(lr, "--weights", weights, "-o", out, "--force").exit_code == 0  # without references, too
    assert np.array_equal(pixels(out), expected(weights, lr, []))


def saved(path: Path, image: PilImage.Image, profile: bytes | None = None) -> Path:
    image.save(path, icc_profile=profile)
    return path


def test_alpha_grey_and_16_bit_pictures_are_read(files: Path, weights: Path) -> None:
    rgb, alpha = photo(9, 11, 5), photo(9, 11, 6)[:, :, :1]
    odd = {
        "alpha.png": PilImage.fromarray(np.concatenate([rgb, alpha], 2)),
        "grey.png": PilImage.fromarray(rgb[:, :, 0]),
        "deep.png": PilImage.fromarray(rgb[:, :, 0].astype(np.uint16) * 257),
    }
    for name, image in odd.items():
        lr, out = saved(files / name, image), files / f"out-{name}"
        assert run(lr, "--ref", files / "a.png", "--weights", weights, "-o", out).exit_code == 0
        assert np.array_equal(pixels(out), expected(weights, lr, [files / "a.png"]))
        with PilImage.open(out) as made:
            assert made.mode == "RGB"


def test_the_profile_of_an_rgb_picture_is_kept(files: Path, weights: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    grey_profile = profile[:16] + b"GRAY" + profile[20:]
    rgb = PilImage.fromarray(photo(9, 11, 5))
    for name, image, given, kept in (
        ("rgb", rgb, profile, profile),
        ("none", rgb, None, None),
        ("grey", rgb.convert("L"), grey_profile, None),
    ):
        lr, out = saved(files / f"{name}.png", image, given), files / f"out-{name}.png"
        assert run(lr, "--weights", weights, "-o", out).exit_code == 0
        with PilImage.open(io.BytesIO(out.read_bytes())) as picture_out:
            assert picture_out.info.get("icc_profile") == kept


def test_a_folder_of_pictures(folders: Path, weights: Path) -> None:
    targets, refs, out = folders / "targets", folders / "refs", folders / "out"
    result = run(targets, "--refs", refs, "--weights", weights, "-o", out, "--matches", folders / "matches")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out}: 3 made, 0 there already, 0 failed\n"
    assert f"{targets}: 1 entries are no target's and not read: notes.txt\n" in result.stderr
    own = {
        "cat": [refs / "cat" / "x.png", refs / "cat_1.png"],
        "cat_two": [refs / "cat_two_1.png"],
        "dog": [refs / "dog" / "y.png"],
    }
    for stem, references in own.items():
        assert np.array_equal(pixels(out / f"{stem}.png"), expected(weights, targets / f"{stem}.png", references))
    assert sorted(listing(out)) == sorted(listing(folders / "matches")) == ["cat.png", "cat_two.png", "dog.png"]


def test_a_stopped_run_goes_on_where_it_was(folders: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets, refs, out = folders / "targets", folders / "refs", folders / "out"
    command = (targets, "--refs", refs, "--weights", weights, "-o", out)
    plain = module._write

    def stop_at_the_second(job: module.Job, *rest: object) -> None:
        if job.target.stem == "cat_two":
            raise KeyboardInterrupt
        plain(job, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_write", stop_at_the_second)
    run(*command)
    assert sorted(listing(out)) == ["cat.png"]
    monkeypatch.undo()
    os.utime(out / "cat.png", (1, 1))
    assert run(*command).stdout == f"{out}: 2 made, 1 there already, 0 failed\n"
    assert (out / "cat.png").stat().st_mtime == 1
    assert run(*command).stdout == f"{out}: 0 made, 3 there already, 0 failed\n"
    assert run(*command, "--force").stdout == f"{out}: 3 made, 0 there already, 0 failed\n"
    assert (out / "cat.png").stat().st_mtime > 1


def test_what_fails_in_a_folder_is_listed_and_the_rest_made(folders: Path, weights: Path) -> None:
    targets, refs, out = folders / "targets", folders / "refs", folders / "out"
    write(targets / "alone.png", photo(8, 8, 4))
    write(targets / "small.png", photo(2, 9, 4))
    write(refs / "small_1.png", photo(24, 24, 4))
    (refs / "dog" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    result = run(targets, "--refs", refs, "--weights", weights, "-o", out)
    assert result.exit_code == 3
    assert result.stdout == f"{out}: 2 made, 0 there already, 3 failed\n"
    told = [line for line in result.stderr.splitlines() if line.startswith("failed: ")]
    assert len(told) == 3
    assert told[0].startswith(
        f"failed: {targets / 'alone.png'}: no references, expected in {refs}/alone/ or as {refs}/alone_*"
    )
    assert f"{targets / 'dog.png'}: reference {refs / 'dog' / 'broken.jpg'}: " in told[1]
    assert f"{targets / 'small.png'}: LR of 9x2 pixels is smaller than one 3x3 patch" in told[2]
    assert sorted(listing(out)) == ["cat.png", "cat_two.png"]


def test_references_that_all_targets_share(folders: Path, weights: Path) -> None:
    targets, out, shared_reference = folders / "targets", folders / "out", folders / "refs" / "cat_1.png"
    result = run(targets, "--ref", shared_reference, "--refs", folders / "refs", "--weights", weights, "-o", out)
    assert result.exit_code == 0
    references = [shared_reference, folders / "refs" / "dog" / "y.png"]
    assert np.array_equal(pixels(out / "dog.png"), expected(weights, targets / "dog.png", references))


def test_what_no_target_reads_is_told(folders: Path, weights: Path) -> None:
    """Misnamed references, and pictures of a format that is not read; results among them are not meant."""
    targets, refs = folders / "targets", folders / "refs"
    write(refs / "dgo" / "z.png", photo(24, 24, 15))
    write(refs / "dog-2.png", photo(24, 24, 16))
    (targets / "bird.bmp").touch()
    result = run(targets, "--refs", refs, "--weights", weights, "-o", targets / "out", "--matches", refs / "matches")
    assert f"{targets}: 2 entries are no target's and not read: bird.bmp, notes.txt\n" in result.stderr
    assert f"{refs}: 3 entries are no target's and not read: dgo, dog-2.png, notes.txt\n" in result.stderr
    again = run(targets, "--refs", refs, "--weights", weights, "-o", targets / "out", "--matches", refs / "matches")
    assert "bird.bmp, notes.txt\n" in again.stderr and "dog-2.png, notes.txt\n" in again.stderr


def test_a_reference_belongs_to_the_longest_name_that_fits(tmp_path: Path) -> None:
    for name in ("a_1.png", "a_b_1.png", "a_b.png", "ab_1.png", "b/z.JPG", "b/deep/w.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = references_of(["a", "a_b", "b", "c"], tmp_path)
    names = {stem: [str(path.relative_to(tmp_path)) for path in paths] for stem, paths in found.items()}
    assert names == {"a": ["a_1.png", "a_b.png"], "a_b": ["a_b_1.png"], "b": ["b/z.JPG"], "c": []}


def test_bad_weights_are_told_in_one_line(files: Path, weights: Path) -> None:
    lr, reference, out = files / "lr.png", files / "a.png", files / "out.png"
    net = RRDBNet(features=4, blocks=1, growth=2)
    config = {"features": 4, "blocks": 1, "growth": 2}
    other = Checkpoint(kind="esrgan", config=config, parts={"network": dict(net.state_dict())})
    save_checkpoint(files / "esrgan.safetensors", other)
    damaged = bytearray(weights.read_bytes())
    damaged[-100] ^= 1
    (files / "damaged.safetensors").write_bytes(damaged)
    (files / "cut.safetensors").write_bytes(weights.read_bytes()[:5000])
    before = listing(files)
    missing = refused(lr, "--ref", reference, "-o", out)
    assert "--weights is missing" in missing
    assert "lmr weights" in missing
    assert "lmr convert-checkpoint" in missing
    for name, message in (
        ("esrgan.safetensors", "holds weights of kind esrgan, but mrefsr is needed"),
        ("damaged.safetensors", "damaged"),
        ("cut.safetensors", "not a readable checkpoint"),
        ("nowhere.safetensors", "no such file"),
    ):
        assert message in refused(lr, "--ref", reference, "--weights", files / name, "-o", out)
    assert listing(files) == before


def test_bad_paths_are_told_in_one_line_and_nothing_is_written(
    files: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lr, reference, out, rest = files / "lr.png", files / "a.png", files / "out.png", ("--weights", weights)
    (files / "broken.png").write_bytes(reference.read_bytes()[:300])
    (files / "empty").mkdir()
    write(files / "small.png", photo(2, 2, 0))
    before = listing(files)

    def of(*given: object) -> str:
        return refused(*given, *rest)

    assert f"{files / 'no.png'}: no such picture" in of(files / "no.png", "-o", out)
    assert "LR of 2x2 pixels is smaller than one 3x3 patch" in of(files / "small.png", "--ref", reference, "-o", out)
    assert f"{lr}: reference {files / 'broken.png'}: broken" in of(lr, "--ref", files / "broken.png", "-o", out)
    assert f"{files / 'broken.png'}: broken" in of(files / "broken.png", "--ref", reference, "-o", out)
    assert f"--ref {files / 'no.png'}: no such file" in of(lr, "--ref", files / "no.png", "-o", out)
    assert "this folder holds no picture" in of(lr, "--ref", files / "empty", "-o", out)
    assert "does not exist; make it first" in of(lr, "--ref", reference, "-o", files / "no" / "out.png")
    assert "does not exist; make it first" in of(lr, "--ref", reference, "-o", reference / "out.png")
    assert "the result is a PNG" in of(lr, "--ref", reference, "-o", files / "out.jpg")
    assert "is a folder; name a file such as" in of(lr, "--ref", reference, "-o", files / "empty")
    assert "is one of the pictures that are read" in of(lr, "--ref", reference, "-o", reference, "--force")
    assert "is a .png or .jpg" in of(lr, "--ref", reference, "-o", out, "--matches", files / "m.gif")
    assert "would be written twice" in of(lr, "--ref", reference, "-o", out, "--matches", out)
    assert f"give --ref {files}" in of(lr, "--refs", files, "-o", out)
    assert "--device qpu" in of(lr, "--ref", reference, "-o", out, "--device", "qpu")
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    assert f"the folder {files} is not writable" in of(lr, "--ref", reference, "-o", out)
    assert listing(files) == before


def test_bad_folders_are_told_in_one_line_and_nothing_is_written(folders: Path, weights: Path) -> None:
    targets, refs, rest = folders / "targets", folders / "refs", ("--weights", weights)
    (folders / "empty").mkdir()
    before = listing(folders)
    layout = refused(targets, "--refs", folders / "empty", "-o", folders / "out", *rest)
    assert "no references for any of the 3 targets" in layout
    assert f"{folders / 'empty'}/NAME/ or as {folders / 'empty'}/NAME_*" in layout
    assert "no references: give --refs" in refused(targets, "-o", folders / "out", *rest)
    assert "no such folder" in refused(targets, "--refs", folders / "no", "-o", folders / "out", *rest)
    assert "holds no picture" in refused(folders / "empty", "--refs", refs, "-o", folders / "out", *rest)
    assert "is the folder of the targets" in refused(targets, "--refs", refs, "-o", targets, *rest)
    assert "is a file" in refused(targets, "--refs", refs, "-o", refs / "cat_1.png", *rest)
    same = (targets, "--refs", refs, "-o", folders / "out", "--matches", folders / "out", *rest)
    assert "would be written twice" in refused(*same)
    assert listing(folders) == before
    write(targets / "cat.jpg", photo(8, 8, 0))
    assert "both would become cat.png" in refused(targets, "--refs", refs, "-o", folders / "out", *rest)
    assert not (folders / "out").exists()


@pytest.mark.parametrize("value", ["0", "-4", "wide", "1.5"])
def test_a_tile_is_a_number_auto_or_none(files: Path, value: str) -> None:
    result = run(files / "lr.png", "-o", files / "out.png", "--tile", value)
    assert result.exit_code == 2
    assert "is not auto, none or a side in LR pixels" in result.stderr


def test_the_help_explains_the_layout_of_folders() -> None:
    text = " ".join(run("--help").stdout.split())
    assert "REFS/cat/ and those named REFS/cat_*" in text
