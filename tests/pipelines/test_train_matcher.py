"""`lmr train-matcher` from a dataset to a matcher, and what it says when it can not."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from lmr_tools.images import decode, encode_png
from lmr_tools.tables import sha256_file
from mrefsr.checkpoints import load_checkpoint, load_matcher, load_model, save_matcher
from mrefsr.features import MatchingExtractor
from mrefsr.infer import super_resolve
from pipelines.cli import cli
from tests.lmr_tools.painted_dataset import paint_dataset, painted
from tests.mrefsr.training_fixture import fake_weights

SMALL = ("--steps", 2, "--batch", 2, "--crop", 32, "--device", "cpu", "--log-every", 1)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint_dataset(tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture(scope="module", autouse=True)
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    home = tmp_path_factory.mktemp("torch")
    fake_weights(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(home))
        yield


def run(*arguments: object) -> Result:
    return lmr("train-matcher", *arguments)


def lmr(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in arguments])


def student_of(teacher: Path, dataset: Path, out: Path) -> tuple[object, ...]:
    stage = ("--stage", "student", "--teacher", teacher / "matcher.safetensors")
    return (*stage, "--dataset", dataset, "--out", out, *SMALL)


@pytest.fixture(scope="module")
def teacher(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "teacher"
    result = run("--stage", "teacher", "--dataset", dataset, "--out", out, *SMALL)
    assert result.exit_code == 0, result.output
    assert "step      0  held out:" in result.stderr and "--stage student --teacher" in result.stderr
    return out


@pytest.fixture(scope="module")
def student(dataset: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "student"
    result = run(*student_of(teacher, dataset, out))
    assert result.exit_code == 0, result.output
    assert "distillation" in result.stderr and "lmr train --matcher" in result.stderr
    return out


def test_a_teacher_then_its_student_and_nothing_to_do_the_second_time(
    dataset: Path, teacher: Path, student: Path
) -> None:
    first = load_checkpoint(teacher / "matcher.safetensors")
    assert first.kind == "matcher" and first.provenance["stage"] == "teacher" and first.provenance["steps"] == 2
    before = (student / "matcher.safetensors").read_bytes()
    result = run(*student_of(teacher, dataset, student))
    assert result.exit_code == 0 and "going on after step 2" in result.stderr
    assert (student / "matcher.safetensors").read_bytes() == before


def test_a_model_trained_with_a_matcher_matches_with_it(dataset: Path, student: Path, tmp_path: Path) -> None:
    out, matcher = tmp_path / "run", student / "matcher.safetensors"
    keys = ("steps=2", "batch=2", "crop=32", "warmup=1", "validate_groups=0")
    words = ("train", "tiny", "--dataset", dataset, "--out", out, "--device", "cpu", *(f"--set={key}" for key in keys))
    result = lmr(*words, "--matcher", matcher)
    assert result.exit_code == 0, result.output
    model = load_model(out / "model.safetensors")
    trained, start = load_matcher(matcher).state_dict(), model.transfer.state_dict()  # VGG16, as the matcher began
    for name, value in model.extractor.state_dict().items():
        assert torch.equal(value, trained[name]), name
        assert torch.equal(value, start[name.split(".", 1)[1]]) == name.endswith((".mean", ".std")), name
    about = load_checkpoint(out / "model.safetensors").provenance
    assert about["matching"] == f"matcher.safetensors, sha256 {sha256_file(matcher)}"

    other = lmr(*words)
    assert other.exit_code == 1 and "the run began with another matching and transfer weights" in other.stderr

    lr, reference = painted(0, 0)[:16, :24], painted(0, 1)
    (tmp_path / "lr.png").write_bytes(encode_png(lr))
    (tmp_path / "ref.png").write_bytes(encode_png(reference))
    options = ("--ref", tmp_path / "ref.png", "--weights", out / "model.safetensors", "--device", "cpu")
    result = lmr("upscale", tmp_path / "lr.png", *options, "-o", tmp_path / "sr.png")
    assert result.exit_code == 0, result.output
    shown = decode((tmp_path / "sr.png").read_bytes())
    assert np.array_equal(shown, super_resolve(model, lr, [reference]))


def test_bad_usage_and_bad_input_are_one_line_each(dataset: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_matcher(other, MatchingExtractor(), {"stage": "student"})
    base = ("--dataset", dataset, "--out", tmp_path / "run")
    cases = (
        (("--stage", "student", *base), 2, "--stage student: needs --teacher FILE"),
        (("--stage", "teacher", *base, "--teacher", other), 2, "--stage teacher: takes no --teacher"),
        (("--stage", "teacher", *base, "--crop", 30), 2, "crop 30: must be a multiple of 4"),
        (("--stage", "teacher", *base, "--crop", 128), 1, "crop 128: larger than the stored 64x64 crops"),
        (("--stage", "teacher", "--dataset", tmp_path / "no", "--out", tmp_path / "run"), 1, str(tmp_path / "no")),
        (("--stage", "student", *base, "--crop", 32, "--teacher", other), 1, "is a student itself"),
        (("--stage", "teacher", *base, "--crop", 32, "--start-from", tmp_path / "no.safetensors"), 1, "no such file"),
    )
    for arguments, code, text in cases:
        result = run(*arguments)
        assert result.exit_code == code, result.output
        assert text in result.stderr.strip().splitlines()[-1]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.jpg").touch()
    result = run("--stage", "teacher", "--dataset", dataset, "--out", tmp_path / "full", *SMALL)
    assert result.exit_code == 1 and "holds something that is not a training run" in result.stderr
