"""The loop: gradients against a plain process, a run in pieces against a whole one, and what it does on failures."""

import errno
import json
import math
import signal
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from PIL import Image as PilImage

from lmr_tools.metrics import psnr_y, ssim_y
from lmr_tools.schema import LmrError
from mrefsr import learning, train, training_state, validation
from mrefsr.checkpoints import load_checkpoint, load_model
from mrefsr.data import Batch, validation_batches
from mrefsr.learning import clip_gradients, parallel, take_gradients, update
from mrefsr.losses import PerceptualLoss
from mrefsr.machines import Machine
from mrefsr.train import training_batches
from mrefsr.training_state import checkpoints, load_state, new_training
from mrefsr.validation import means, validate
from tests.lmr_tools.dataset_fixture import make_dataset
from tests.mrefsr.training_fixture import ALONE, begin, data_of, fake_weights, short, weights_of

GAN = {"perceptual": 1e-2, "adversarial": 1e-2, "l1_steps": 1, "critic": "clean"}
FACTS = {"dataset": "d"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def torch_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torch") / "home"
    fake_weights(folder)
    return folder


@pytest.fixture(autouse=True)
def stand_ins(torch_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    # Up to relu2_1 of a random VGG: relu5_1 has 13 M parameters.
    fake = partial(PerceptualLoss, layers={"relu2_1": 1.0}, weights=None)
    monkeypatch.setattr(training_state, "PerceptualLoss", lambda **options: _seeded(partial(fake, **options)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _seeded(make: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return make()


class Lines:
    """A `Show` that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: list[int] = []

    def step(self, done: int, total: int, text: str) -> None:
        self.steps.append(done)

    def line(self, text: str) -> None:
        self.lines.append(text)


def run(training: training_state.Training, dataset: Path, out: Path, show: Lines | None = None) -> bool:
    return train.train(
        training, data_of(dataset), out, ALONE, facts=FACTS, provenance={"by": "test"}, show=show or Lines()
    )


def gradients(training: training_state.Training) -> dict[str, torch.Tensor]:
    found = {f"network.{n}": p.grad for n, p in training.model.network.named_parameters() if p.grad is not None}
    if training.critic is not None:
        found |= {f"critic.{n}": p.grad for n, p in training.critic.named_parameters() if p.grad is not None}
    return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


def one_step(dataset: Path, machine: Machine, **overrides: Any) -> dict[str, torch.Tensor]:
    """Gradients of the second step: the critic is at work, no parameter is at its start of zero."""
    training = new_training(short(**GAN, no_reference_share=0.5, **overrides), machine.device)
    batches = training_batches(data_of(dataset).train, training.config, machine, 0)
    net = parallel(training, machine)
    take_gradients(training, net, machine, batches)
    update(training)
    take_gradients(training, net, machine, batches)
    return gradients(training)


def plain_gradients(dataset: Path) -> dict[str, torch.Tensor]:
    """The same, written out on the whole batch."""
    training = new_training(short(**GAN, no_reference_share=0.5), ALONE.device)
    config, net, critic = training.config, training.model, training.critic
    assert critic and training.perceptual
    first, second = islice(training_batches(data_of(dataset).train, config, ALONE, 0), 2)

    def sr(batch: Batch) -> torch.Tensor:
        return net(batch.lr, batch.enlarged, batch.references, batch.mask)

    (sr(first) - first.target).abs().mean().backward()
    for group in training.optimiser.param_groups:
        assert group["lr"] == group["base_lr"]  # one step of warm-up: the full rate at once
    training.optimiser.step()
    net.zero_grad()
    restored = sr(second)
    loss = (restored - second.target).abs().mean() + 1e-2 * training.perceptual(restored, second.target)
    (loss - 1e-2 * critic(restored).mean()).backward()
    critic.zero_grad()
    restored = restored.detach()
    alpha = torch.rand(4, 1, 1, 1, generator=torch.Generator().manual_seed(config.seed * 1_000_003 + 2))
    mixed = (alpha * second.target + (1 - alpha) * restored).requires_grad_()
    (slope,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
    penalty = ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean()
    (critic(restored).mean() - critic(second.target).mean() + 10 * penalty).backward()
    return gradients(training)


def _rank(rank: int, meeting: str, dataset: Path, out: Path) -> None:
    torch.set_num_threads(1)
    training_state.PerceptualLoss = lambda **options: _seeded(  # type: ignore[assignment,misc]
        partial(PerceptualLoss, layers={"relu2_1": 1.0}, weights=None, **options)
    )
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    found = one_step(dataset, Machine(device=torch.device("cpu"), rank=rank, world_size=2))
    torch.save(found, out / f"{rank}.pt")
    dist.destroy_process_group()


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Sums in another order: a few ReLUs fall on their other side. A wrong weight of a sample is off by far more.
        assert float((found[name] - value).norm()) <= 5e-3 * float(value.norm()), name


def test_passes_and_processes_add_up_to_the_whole_batch(dataset: Path, tmp_path: Path) -> None:
    expected = plain_gradients(dataset)
    assert any(name.startswith("critic.") for name in expected) and len(expected) > 100
    assert_close(one_step(dataset, ALONE), expected)
    assert_close(one_step(dataset, ALONE, accumulate=2), expected)
    processes.spawn(_rank, (f"file://{tmp_path}/meeting", dataset, tmp_path), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert_close(ranks[0], expected)
    for name, value in ranks[0].items():
        assert torch.equal(value, ranks[1][name])


@pytest.mark.parametrize("overrides", [{}, GAN | {"critic": "published"}], ids=["l1", "gan"])
def test_a_run_in_pieces_is_the_whole_run(dataset: Path, tmp_path: Path, overrides: dict[str, Any]) -> None:
    whole = begin(**overrides)
    assert run(whole, dataset, tmp_path / "whole")
    first = tmp_path / "whole" / "checkpoints" / "step-000000002.pt"
    rest = begin(**overrides)
    load_state(first, rest, FACTS)
    assert (rest.step, rest.position) == (2, 8)
    assert run(rest, dataset, tmp_path / "rest")
    for name, value in weights_of(whole).items():
        assert torch.equal(weights_of(rest)[name], value), name


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own Ctrl-C, also where the tests were started to ignore it (in the background)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("presses", "steps"), [(1, [1, 2, 3]), (2, [1, 2])])
def test_one_ctrl_c_ends_with_a_checkpoint_and_a_second_one_at_once(
    interruptible: None, dataset: Path, tmp_path: Path, presses: int, steps: list[int]
) -> None:
    class Person(Lines):
        def step(self, done: int, total: int, text: str) -> None:
            super().step(done, total, text)
            for _ in range(presses if done == 2 else 0):
                signal.raise_signal(signal.SIGINT)

    person, training = Person(), begin(checkpoint_every=100)
    if presses == 1:
        assert not run(training, dataset, tmp_path, person)
    else:
        with pytest.raises(KeyboardInterrupt):
            run(training, dataset, tmp_path, person)
    assert person.steps == steps and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    saved = [path.stem for path in checkpoints(tmp_path / "checkpoints")]
    assert saved == (["step-000000003"] if presses == 1 else [])


def test_the_averaged_weights_are_the_model(dataset: Path, tmp_path: Path) -> None:
    training = begin(ema=0.3)
    batches = training_batches(data_of(dataset).train, training.config, ALONE, 0)
    average = {name: value.double() for name, value in training.model.network.state_dict().items()}
    for step in range(1, training.config.steps + 1):
        take_gradients(training, training.model, ALONE, batches)
        clip_gradients(training)
        update(training)
        decay = min(0.3, (1 + step) / (10 + step))
        for name, value in training.model.network.state_dict().items():
            average[name] = decay * average[name] + (1 - decay) * value
    run(begin(ema=0.3), dataset, tmp_path)
    model = load_model(tmp_path / train.FINAL)
    for name, value in model.network.state_dict().items():
        torch.testing.assert_close(value, average[name].float(), rtol=1e-4, atol=1e-7)
    assert load_checkpoint(tmp_path / train.FINAL).provenance == {"by": "test", "steps": 4}


def test_no_averaging_keeps_the_weights_themselves(dataset: Path, tmp_path: Path) -> None:
    training = begin(ema=0)
    assert training.averaged is training.model
    run(training, dataset, tmp_path)
    model = load_model(tmp_path / train.FINAL)
    for name, value in training.model.network.state_dict().items():
        assert torch.equal(model.network.state_dict()[name], value)


def test_learning_rates_by_group_and_the_norm(dataset: Path) -> None:
    training = begin(lr=0.01, offset_lr=(0.1, 0.2, 0.3), clip=0.1)
    batches = training_batches(data_of(dataset).train, training.config, ALONE, 0)
    take_gradients(training, training.model, ALONE, batches)
    before = math.sqrt(sum(float(g.double().square().sum()) for g in gradients(training).values()))
    assert before > 0.1
    assert clip_gradients(training) == pytest.approx(before, rel=1e-4)
    after = math.sqrt(sum(float(g.double().square().sum()) for g in gradients(training).values()))
    assert after == pytest.approx(0.1, rel=1e-4)
    update(training)
    rates = {group["name"]: group["lr"] for group in training.optimiser.param_groups}
    assert rates == pytest.approx({"g": 0.01, "relu3_offset": 0.001, "relu2_offset": 0.002, "offset": 0.003})


def test_the_latest_checkpoints_are_kept_and_the_log_holds_every_step_once(dataset: Path, tmp_path: Path) -> None:
    training = begin(steps=5, checkpoint_every=1, keep=2)
    show = Lines()
    run(training, dataset, tmp_path, show)
    assert [path.stem for path in checkpoints(tmp_path / "checkpoints")] == ["step-000000004", "step-000000005"]
    log = tmp_path / "log.jsonl"
    with log.open("a") as file:
        file.write('{"step": 9')  # a killed run's last line
    rest = begin(steps=5, checkpoint_every=1, keep=2)
    load_state(tmp_path / "checkpoints" / "step-000000004.pt", rest, FACTS)
    run(rest, dataset, tmp_path)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4, 5]
    for record in records[:4]:
        assert record["loss"] == record["l1"] > 0 and record["samples_per_s"] > 0 and 0 <= record["data_wait"] <= 1
    assert show.steps == [1, 2, 3, 4, 5]


def test_half_precision_learns_too(dataset: Path, tmp_path: Path) -> None:
    for precision, steps in (("bf16", 2), ("fp16", 12)):  # fp16's scaler skips steps until its factor is low enough
        training = begin(precision=precision, steps=steps, validate_groups=0)
        before = weights_of(training)
        run(training, dataset, tmp_path / precision)
        changed = [name for name, value in weights_of(training).items() if not torch.equal(value, before[name])]
        assert len(changed) > 100
        assert all(value.isfinite().all() for value in weights_of(training).values())


def test_validation_is_the_metrics_of_8_bit_pictures_beside_bicubic(dataset: Path, tmp_path: Path) -> None:
    training = begin()
    run(training, dataset, tmp_path)
    batches = list(validation_batches(data_of(dataset).held_out or ""))
    scored = validate(training.averaged, batches, ALONE, 1)
    assert len(scored) == len(batches) == 2
    for score, batch in zip(scored, batches, strict=True):
        with torch.no_grad():
            sr = training.averaged(batch.lr, batch.enlarged, batch.references, batch.mask)
        pictures = [
            np.round(np.clip(image[0].permute(1, 2, 0).numpy(), 0, 1) * 255).astype(np.uint8)
            for image in (sr, batch.target, batch.enlarged)
        ]
        assert score.group_id == batch.group_ids[0]
        assert (score.psnr, score.ssim) == pytest.approx((psnr_y(*pictures[:2]), ssim_y(*pictures[:2])), rel=1e-9)
        assert score.bicubic_psnr == psnr_y(pictures[2], pictures[1])
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()][-1]
    assert logged["val_psnr"] == means(scored)["psnr"]
    assert training.best == means(scored)["psnr"]
    assert load_checkpoint(tmp_path / train.BEST).provenance["validation"] == means(scored)
    with PilImage.open(tmp_path / "pictures" / "step-000000004.png") as sheet:
        assert sheet.width > 5 * validation.CELL  # LR, bicubic, SR, GT, references
        # GT as it is, 64 px scaled to the cell
        left = validation.GAP + 3 * (validation.CELL + validation.GAP)
        cell = sheet.crop((left, validation.TOP, left + validation.CELL, validation.TOP + validation.CELL))
        target = batches[0].target[0].permute(1, 2, 0).mul(255).round().byte().numpy()
        assert np.array_equal(np.array(cell), np.array(validation.drawing.scaled(target, 160, 160)))


def test_tensorboard_shows_what_the_log_holds(dataset: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(begin(), dataset, tmp_path)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    shown = {event.step: event.value for event in board.Scalars("loss")}
    assert shown == {r["step"]: pytest.approx(r["loss"]) for r in records if "loss" in r} and len(shown) == 4
    (psnr,) = board.Scalars("validation/psnr")
    assert psnr.value == pytest.approx(records[-1]["val_psnr"])
    assert [image.step for image in board.Images("samples")] == [4]


def test_processes_share_the_validation_in_order() -> None:
    class Three:
        rank, world_size, first = 0, 3, True
        device = ALONE.device

        def gather(self, own: list[Any]) -> list[Any]:
            return [["a", "d"], ["b", "e"], ["c"]]

    assert validate(begin().model, [], Three(), 0) == ["a", "b", "c", "d", "e"]  # type: ignore[arg-type,comparison-overlap]


def test_a_loss_that_is_not_finite_stops_the_run_with_the_state_before(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = begin()
    run(whole, dataset, tmp_path / "whole")
    calls = []

    def fails(sr: torch.Tensor, gt: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return (sr - gt).abs().mean() * (math.nan if len(calls) == 3 else 1)

    monkeypatch.setattr(learning, "reconstruction", fails)
    with pytest.raises(LmrError) as error:
        run(begin(), dataset, tmp_path / "bad")
    ids = next(islice(training_batches(data_of(dataset).train, short(), ALONE, 8), 1)).group_ids
    text = str(error.value)
    assert text.startswith("step 3: loss, l1, gradient_norm not finite, groups " + ", ".join(ids))
    kept = tmp_path / "bad" / "checkpoints" / "before-step-000000003.pt"
    assert str(kept) in text and "\n" not in text
    before, good = begin(), begin()
    load_state(kept, before, FACTS)
    load_state(tmp_path / "whole" / "checkpoints" / "step-000000002.pt", good, FACTS)
    for name, value in weights_of(good).items():
        assert torch.equal(weights_of(before)[name], value)
    assert [path.stem for path in checkpoints(tmp_path / "bad" / "checkpoints")] == ["step-000000002"]


def test_a_full_disk_costs_a_checkpoint_not_the_run(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = torch.save, []

    def full(value: Any, file: Any) -> None:
        calls.append(1)
        if len(calls) in (2, 3):
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(value, file)

    monkeypatch.setattr(torch, "save", full)
    show = Lines()
    assert run(begin(steps=4, checkpoint_every=1, keep=1), dataset, tmp_path, show)
    warnings = [line for line in show.lines if line.startswith("warning")]
    assert len(warnings) == 2 and "step-000000002.pt could not be written (No space left on device)" in warnings[0]
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-000000004.pt"]
    assert (tmp_path / train.FINAL).exists()


def test_the_best_model_is_the_best_that_could_be_written(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores, real = iter([30.0, 29.0, 28.0]), train.save_model

    def full(path: Path, model: Any, provenance: dict[str, Any]) -> None:
        if provenance["steps"] == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, model, provenance)

    monkeypatch.setattr(train, "means", lambda scored: means(scored) | {"psnr": next(scores)})
    monkeypatch.setattr(train, "save_model", full)
    training = begin(steps=3, validate_every=1, validate_groups=1, pictures=0)
    assert run(training, dataset, tmp_path) and training.best == 29.0
    assert load_checkpoint(tmp_path / train.BEST).provenance["steps"] == 2
