"""Training of the matcher: it lowers its loss, and a run that was stopped or killed ends as one that was not."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lmr_tools.schema import LmrError
from lmr_tools.stream import open_samples
from lmr_tools.weight_fetch import fetch
from mrefsr import features
from mrefsr import train_matcher as module
from mrefsr.checkpoints import load_checkpoint, load_matcher, save_matcher
from mrefsr.config import MODEL_PRESETS
from mrefsr.correspondence import Pairs, make_pair, stack_pairs
from mrefsr.features import MatchingExtractor
from mrefsr.matcher_run import MatcherConfig, MatcherRun, go_on, new_run
from mrefsr.model import new_model
from mrefsr.sampling import Draws, sample_at
from mrefsr.stopping import StopRequest
from mrefsr.train_matcher import RESULT, pair_batches, shares_within, step_loss, train_matcher
from mrefsr.watch import LOG
from tests.lmr_tools.painted_dataset import paint_dataset
from tests.mrefsr.test_correspondence import texture
from tests.mrefsr.training_fixture import fake_weights

CPU = torch.device("cpu")
SHORT = {"steps": 4, "batch": 2, "crop": 32, "shift": 2.0, "lr": 1e-4, "checkpoint_every": 2, "log_every": 1,
         "validate_every": 100, "validate_pairs": 0}  # fmt: skip
FACTS = {"dataset": "d", "start": "s", "teacher": "t"}


class Killed(Exception):
    """Stands for a kill: nothing runs after it."""


class Screen:
    """A `Show` that does something at a step."""

    def __init__(self, at: int = 0, act: Callable[[], None] = lambda: None) -> None:
        self.at, self.act, self.lines = at, act, list[str]()

    def step(self, done: int, total: int, text: str) -> None:
        if done == self.at:
            self.act()

    def line(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint_dataset(tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A matcher with random weights that keep the signal's size: a stand-in for ImageNet's."""
    extractor, generator = MatchingExtractor(), torch.Generator().manual_seed(0)
    for parameter in extractor.feature_extraction_image1.parameters():
        deviation = (2 / parameter[0].numel()) ** 0.5 if parameter.ndim == 4 else 0.05
        parameter.data.normal_(0, deviation, generator=generator)
    extractor.feature_extraction_image2.load_state_dict(extractor.feature_extraction_image1.state_dict())
    path = tmp_path_factory.mktemp("start") / "start.safetensors"
    save_matcher(path, extractor, {"stage": "teacher"})
    return path


def config(stage: Any = "student", **options: Any) -> MatcherConfig:
    return MatcherConfig(stage=stage, **(SHORT | options))


def begin(start: Path, stage: str = "student", **options: Any) -> MatcherRun:
    return new_run(config(stage, **options), CPU, start=start, teacher=start if stage == "student" else None)


def train(run: MatcherRun, dataset: Path, folder: Path, show: Screen | None = None, resume: str = "auto") -> bool:
    folder.mkdir(exist_ok=True)
    go_on(folder, run, FACTS, resume)
    stores = open_samples(dataset, "train"), open_samples(dataset, "val")
    return train_matcher(run, *stores, folder, facts=FACTS, provenance={"stage": "x"}, show=show or Screen())


def textured(seed: int, count: int = 2) -> Pairs:
    rule = config(crop=48, shift=3.0).rule()
    return stack_pairs([make_pair(texture(seed + n), rule, Draws(0, 3, seed + n)) for n in range(count)])


def learn(run: MatcherRun, steps: int) -> tuple[float, float]:
    """The loss on pairs it does not learn from, before and after."""
    unseen, losses = textured(100), list[float]()
    for step in range(steps):
        with torch.no_grad():
            losses.append(step_loss(run, unseen)[0].item())
        loss, _ = step_loss(run, textured(2 * step))
        run.optimiser.zero_grad()
        loss.backward()
        run.optimiser.step()
    with torch.no_grad():
        return losses[0], step_loss(run, unseen)[0].item()


def test_teacher_and_student_lower_their_loss_on_unseen_pairs(start: Path, tmp_path: Path) -> None:
    teacher = begin(start, "teacher", lr=3e-4)
    before, after = learn(teacher, 8)
    assert after < 0.6 * before
    save_matcher(tmp_path / "teacher.safetensors", teacher.extractor, {"stage": "teacher"})
    student = new_run(config(lr=3e-4), CPU, start=start, teacher=tmp_path / "teacher.safetensors")
    before, after = learn(student, 4)
    assert after < 0.5 * before


def test_the_student_sees_the_enlarged_picture_and_the_teacher_the_sharp_one(start: Path) -> None:
    pairs = textured(0)
    sharp_only = Pairs(image=pairs.image, enlarged=pairs.image, warped=pairs.warped, place=pairs.place)
    student, teacher = begin(start, "student"), begin(start, "teacher")
    with torch.no_grad():
        assert step_loss(student, sharp_only)[1].distillation.item() == pytest.approx(0, abs=1e-5)
        assert step_loss(student, pairs)[1].distillation.item() > 1e-4
        assert step_loss(teacher, pairs)[0] == step_loss(teacher, sharp_only)[0]
    assert student.teacher is not None
    assert not any(parameter.requires_grad for parameter in student.teacher.parameters())


def test_pairs_follow_from_seed_and_position(dataset: Path) -> None:
    store, settings = open_samples(dataset, "train"), config()
    whole = [batch for batch, _ in zip(pair_batches(store, settings, 0), range(8), strict=False)]
    later = next(pair_batches(store, settings, 6))
    assert torch.equal(whole[3].warped, later.warped) and torch.equal(whole[3].place, later.place)
    assert not torch.equal(whole[3].place, next(pair_batches(store, config(seed=1), 6)).place)
    held_out = list(pair_batches(store, settings, 0, 3, held_out=True))
    assert [len(batch.image) for batch in held_out] == [2, 1]
    assert len({batch.place.numpy().tobytes() for batch in [*whole, *held_out]}) == 10


def test_stopped_and_killed_runs_end_as_the_uninterrupted_one(dataset: Path, start: Path, tmp_path: Path) -> None:
    assert train(begin(start), dataset, tmp_path / "whole")
    expected = load_checkpoint(tmp_path / "whole" / RESULT)

    def kill() -> None:
        raise Killed

    with pytest.raises(Killed):
        train(begin(start), dataset, tmp_path / "killed", Screen(3, kill))
    again = begin(start)
    assert train(again, dataset, tmp_path / "killed") and again.step == 4

    stopped = begin(start)
    assert not train(stopped, dataset, tmp_path / "stopped", Screen(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert stopped.step == 3 and not (tmp_path / "stopped" / RESULT).exists()
    assert train(begin(start), dataset, tmp_path / "stopped")
    for name in ("killed", "stopped"):
        found = load_checkpoint(tmp_path / name / RESULT)
        assert found.parts["extractor"].keys() == expected.parts["extractor"].keys()
        for tensor, value in expected.parts["extractor"].items():
            assert torch.equal(found.parts["extractor"][tensor], value), (name, tensor)
        logged = [json.loads(line) for line in (tmp_path / name / LOG).read_text().splitlines()]
        assert [record["step"] for record in logged if "loss" in record] == [1, 2, 3, 4]
    assert [path.name for path in sorted((tmp_path / "whole" / "checkpoints").iterdir())] == [
        "step-000000002.pt",
        "step-000000004.pt",
    ]


@pytest.mark.parametrize("read", range(1, 4))
def test_a_stop_at_any_moment_finds_its_step_saved(
    dataset: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: int
) -> None:
    class Stop(StopRequest):
        """Asked for from the given look at it on."""

        looks = 0

        @property
        def asked(self) -> bool:
            self.looks += 1
            return self.looks >= read

        @asked.setter
        def asked(self, value: bool) -> None:
            pass

    monkeypatch.setattr(module, "StopRequest", Stop)
    stopped = begin(start, checkpoint_every=100)
    assert not train(stopped, dataset, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / f"step-{stopped.step:09d}.pt").is_file()


def test_a_run_killed_before_its_first_checkpoint_logs_its_start_once(
    dataset: Path, start: Path, tmp_path: Path
) -> None:
    def kill() -> None:
        raise Killed

    short = {"steps": 2, "validate_pairs": 1}
    with pytest.raises(Killed):
        train(begin(start, **short), dataset, tmp_path / "run", Screen(1, kill))
    assert train(begin(start, **short), dataset, tmp_path / "run")
    logged = [json.loads(line) for line in (tmp_path / "run" / LOG).read_text().splitlines()]
    assert [record["step"] for record in logged if "within_1" in record] == [0, 2]


def test_a_run_that_began_otherwise_is_refused_by_name(dataset: Path, start: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(begin(start, steps=2), dataset, folder)
    with pytest.raises(LmrError, match=r"run: the run began otherwise \(lr was 0\.0001 and is 0\.01\); use the same"):
        go_on(folder, begin(start, lr=1e-2), FACTS, "auto")
    with pytest.raises(LmrError, match="dataset was 'd' and is 'e'"):
        go_on(folder, begin(start), FACTS | {"dataset": "e"}, "auto")
    with pytest.raises(LmrError, match="holds a run of step-000000002"):
        go_on(folder, begin(start), FACTS, "never")
    longer = begin(start, steps=3)
    go_on(folder, longer, FACTS, "auto")
    assert longer.step == 2
    with pytest.raises(LmrError, match="has 2 steps behind it, more than the 1 asked for"):
        go_on(folder, begin(start, steps=1), FACTS, "auto")
    (folder / "checkpoints" / "step-000000002.pt").write_bytes(b"PK cut")
    with pytest.raises(LmrError, match=r"step-000000002\.pt: not a readable checkpoint"):
        go_on(folder, begin(start), FACTS, "auto")
    for text in ('{"format": "lmr-run"}', '{"format": "lmr-matcher-run", "version": 1}', "[]"):
        (folder / "recipe.json").write_text(text)
        with pytest.raises(LmrError, match="holds another run"):
            go_on(folder, begin(start), FACTS, "auto")
    (folder / "recipe.json").unlink()  # never begun anew beside checkpoints
    with pytest.raises(LmrError, match=r"recipe\.json: no such file"):
        go_on(folder, begin(start), FACTS, "auto")


def test_a_full_disk_does_not_stop_a_run(
    dataset: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, state: dict[str, Any]) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_state", full)
    screen = Screen()
    assert train(begin(start, steps=2), dataset, tmp_path / "run", screen)
    assert [line for line in screen.lines if "No space left" in line and "training goes on" in line]


def test_a_loss_or_gradient_that_is_not_finite_ends_the_run_with_the_state_before(
    dataset: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(begin(start, checkpoint_every=1, keep=9), dataset, tmp_path / "whole")

    class Spoilt(torch.autograd.Function):
        """A number whose gradient is not one."""

        @staticmethod
        def forward(context: Any, value: torch.Tensor) -> torch.Tensor:
            return value.clone()

        @staticmethod
        def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return gradient * float("inf")

    for name, spoil, text in (
        ("loss", lambda loss: loss * float("nan"), "the loss is nan"),
        ("gradient", Spoilt.apply, "and its gradient's norm nan"),
    ):
        calls = list[int]()

        def fails(run: MatcherRun, pairs: Pairs, calls: list[int] = calls, spoil: Any = spoil) -> Any:
            calls.append(1)
            loss, parts = step_loss(run, pairs)
            return (spoil(loss) if len(calls) == 3 else loss), parts

        monkeypatch.setattr(module, "step_loss", fails)
        with pytest.raises(LmrError, match=text) as error:
            train(begin(start), dataset, tmp_path / name)
        store = open_samples(dataset, "train")
        ids = ", ".join(store.group_id(sample_at(position, len(store), 0)) for position in (4, 5))
        kept = tmp_path / name / "checkpoints" / "before-step-000000003.pt"
        assert str(error.value).startswith("step 3: ") and f"groups {ids}; the state before it is in {kept}" in str(
            error.value
        )
        expected = torch.load(tmp_path / "whole" / "checkpoints" / "step-000000002.pt", weights_only=True)
        found = torch.load(kept, weights_only=True)
        assert found["step"] == 2
        for tensor, value in expected["extractor"].items():
            assert torch.equal(found["extractor"][tensor], value), tensor


def test_stages_and_teachers_that_do_not_fit_are_refused(start: Path, tmp_path: Path) -> None:
    student = tmp_path / "student.safetensors"
    save_matcher(student, load_matcher(start), {"stage": "student"})
    for stage, teacher, text in (
        ("student", None, "needs --teacher"),
        ("teacher", start, "takes no --teacher"),
        ("student", student, "is a student itself"),
        ("student", tmp_path / "none.safetensors", "no such file"),
    ):
        with pytest.raises(LmrError, match=text):
            new_run(config(stage), CPU, start=start, teacher=teacher)
    for options, text in (
        ({"steps": 0}, "steps 0: must be at least 1"),
        ({"lr": 0.0}, "lr 0.0: must be a positive number"),
        ({"crop": 30}, "crop 30"),
        ({"stage": "third"}, "stage 'third'"),
    ):
        with pytest.raises(LmrError, match=text):
            config(**options)


def test_shares_count_patches_of_all_pairs(dataset: Path, start: Path) -> None:
    image = textured(0).image
    grid = torch.stack(torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="xy"), -1)
    extractor = load_matcher(start)

    def shares(*places: torch.Tensor) -> dict[str, float]:
        pairs = Pairs(image=image, enlarged=image, warped=image, place=torch.stack(places))
        return shares_within(extractor, (batch for batch in [pairs]), CPU, sharp=False)

    # True places within 1..10 count: 100 of the first pair; of the other, 1.5 to the right, 8 columns of 10.
    assert shares(grid, grid) == {"within_1": 1.0, "within_2": 1.0}
    found = shares(grid, grid + torch.tensor([1.5, 0]))
    assert found == {"within_1": pytest.approx(100 / 180), "within_2": 1.0}
    batches = pair_batches(open_samples(dataset, "val"), config(), 0, 2, held_out=True)
    assert set(shares_within(extractor, batches, CPU, sharp=True)) == {"within_1", "within_2"}


def test_a_matcher_becomes_the_extractor_of_a_new_model(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_weights(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    matcher = tmp_path / "matcher.safetensors"
    extractor = load_matcher(start)
    next(extractor.feature_extraction_image2.parameters()).data.add_(1)  # the copies differ, as after training
    save_matcher(matcher, extractor, {})
    vgg19 = fetch("vgg19")
    monkeypatch.setattr(features, "fetch", {"vgg19": vgg19}.__getitem__)  # VGG16 is not there, and nothing needs it
    config = replace(MODEL_PRESETS["mrefsr-tiny"], backbone="vgg19")
    model = new_model(config, generator=torch.Generator().manual_seed(0), matcher=matcher)
    for name, value in extractor.state_dict().items():
        assert torch.equal(model.extractor.state_dict()[name], value), name
    assert not any(parameter.requires_grad for parameter in model.extractor.parameters())
    with pytest.raises(LmrError, match="no such file"):
        new_model(config, generator=torch.Generator(), matcher=tmp_path / "no.safetensors")
