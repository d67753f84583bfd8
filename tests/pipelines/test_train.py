"""`lmr train` as people run it: killed, stopped, gone on with, in one process and in several; its bad input."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from lmr_tools.tables import sha256_file
from mrefsr import recipes
from mrefsr.checkpoints import load_checkpoint
from mrefsr.config import MODEL_PRESETS
from mrefsr.model import MRefSR
from mrefsr.recipes import TrainConfig
from mrefsr.run_folder import claim_run
from mrefsr.training_state import checkpoints
from pipelines import train as module
from pipelines.cli import Commands
from pipelines.evaluate import evaluate
from pipelines.train import train
from tests.lmr_tools.dataset_fixture import make_dataset
from tests.mrefsr.training_fixture import fake_weights

STEPS = 12
SMALL = {
    "steps": STEPS, "batch": 2, "crop": 32, "warmup": 2, "checkpoint_every": 2, "keep": 4, "validate_every": 8,
    "validate_groups": 2, "pictures": 1, "workers": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def torch_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torch") / "home"
    fake_weights(folder)
    return folder


@pytest.fixture(autouse=True)
def as_started(torch_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process as `start` sets up others: their results are compared bit for bit."""
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def arguments(dataset: Path, out: Path, *more: object, **settings: Any) -> list[str]:
    keys = [f"--set={key}={value}" for key, value in {**SMALL, **settings}.items()]
    return ["train", "tiny", "--dataset", str(dataset), "--out", str(out), *keys, *(str(word) for word in more)]


def start(torch_home: Path, words: list[str], launcher: Sequence[str] = (), **options: Any) -> subprocess.Popen[str]:
    environment = os.environ | {"TORCH_HOME": str(torch_home), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from lmr_pipelines.cli import main; main()", *words]
    return subprocess.Popen(
        [*launcher, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def end(process: subprocess.Popen[str], code: int = 0) -> str:
    output = process.communicate(timeout=900)[0]
    assert process.returncode == code, output
    return output


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def call(*words: object) -> Result:
    return CliRunner().invoke(Commands("lmr", commands={"train": train}), [str(word) for word in words])


def finish(*words: object) -> str:
    """Run to the end in this process: another one takes seconds to import torch."""
    result = call(*words)
    assert result.exit_code == 0, result.output
    return result.output


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


@pytest.fixture(scope="module")
def whole(dataset: Path, torch_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed, in a process of its own."""
    out = tmp_path_factory.mktemp("whole") / "run"
    end(start(torch_home, arguments(dataset, out)))
    return out


@pytest.fixture(scope="module")
def begun(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, as far as an early checkpoint."""
    out = tmp_path_factory.mktemp("begun") / "run"
    shutil.copytree(whole, out)
    for path in checkpoints(out / "checkpoints")[1:]:
        path.unlink()
    (out / "model.safetensors").unlink()
    return out


@pytest.fixture(scope="module")
def gone_on_in_two(
    dataset: Path, torch_home: Path, begun: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """`begun` brought to its end by two processes of torchrun, and what they said."""
    out = tmp_path_factory.mktemp("two") / "run"
    shutil.copytree(begun, out)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    return out, end(start(torch_home, arguments(dataset, out, "--device", "cpu"), torchrun))


def assert_same(out: Path, expected: Path) -> None:
    """Bit for bit, and the loss that was logged last."""
    found = weights(out)
    for name, value in weights(expected).items():
        assert torch.equal(found[name], value), name
    losses = [
        [(r["step"], r["loss"]) for r in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if "loss" in r]
        for run in (out, expected)
    ]
    assert losses[0][-1] == losses[1][-1]


def test_killed_and_stopped_is_the_same_as_undisturbed(
    whole: Path, dataset: Path, torch_home: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = arguments(dataset, out)
    first = start(torch_home, words)
    wait_until(lambda: bool(checkpoints(out / "checkpoints")), first)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    reached = checkpoints(out / "checkpoints")[-1]
    assert not (out / "model.safetensors").exists()

    second = start(torch_home, words)
    wait_until(lambda: checkpoints(out / "checkpoints")[-1] > reached, second)
    second.send_signal(signal.SIGTERM)
    output = end(second, 130)
    assert "going on after step " in output
    stopped = torch.load(checkpoints(out / "checkpoints")[-1], weights_only=True)
    assert f"stopped after step {stopped['step']}; the same command goes on from there" in output
    assert stopped["position"] == 2 * stopped["step"] and stopped["step"] < STEPS

    assert "going on after step " in finish(*words)
    assert_same(out, whole)


def test_two_processes_killed_are_the_same_as_undisturbed(
    gone_on_in_two: tuple[Path, str], begun: Path, dataset: Path, torch_home: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(begun, out)
    words = arguments(dataset, out, "--processes", 2)
    reached = checkpoints(out / "checkpoints")[-1]
    first = start(torch_home, words)
    wait_until(lambda: checkpoints(out / "checkpoints")[-1] > reached, first)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert not (out / "model.safetensors").exists()
    assert "going on after step " in end(start(torch_home, words))
    assert_same(out, gone_on_in_two[0])


def test_another_number_of_processes_goes_on_from_the_same_sample(
    gone_on_in_two: tuple[Path, str], begun: Path, whole: Path
) -> None:
    out, said = gone_on_in_two
    step = torch.load(checkpoints(begun / "checkpoints")[0], weights_only=True)["step"]
    assert f"going on after step {step} " in said and step < STEPS - 4
    found, moved = weights(out), 0.0
    for name, value in weights(whole).items():
        torch.testing.assert_close(found[name], value, rtol=1e-2, atol=2e-4)
        moved = max(moved, float((found[name] - value).abs().max()))
    assert moved > 0  # sums in another order: it did run in two


def test_the_model_is_used_by_upscale_and_says_where_it_is_from(whole: Path, dataset: Path) -> None:
    about = load_checkpoint(whole / "model.safetensors", kind="mrefsr").provenance
    assert about["steps"] == STEPS and about["preset"] == "tiny" and about["recipe"]["crop"] == 32
    recipe = json.loads((whole / "recipe.json").read_text())
    assert about["dataset"]["fingerprint"] == recipe["dataset"]["fingerprint"] and about["dataset"]["groups"] == 4
    assert about["matching"] == "ImageNet VGG16" and "torch" in about["versions"]
    assert str(dataset) not in json.dumps(about)
    from mrefsr.systems import load_method

    restore = load_method("mrefsr", whole / "model.safetensors", torch.device("cpu"))
    picture = torch.zeros(16, 16, 3, dtype=torch.uint8).numpy()
    assert restore(picture, [picture]).shape == (64, 64, 3)


def test_a_failing_process_is_told_of_once(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    refused = call(*arguments(dataset, out, "--processes", 2, batch=3))
    assert refused.exit_code == 1
    assert refused.output.strip().splitlines()[-1].startswith("Error: batch 3: does not split evenly over 2 processes")
    broken = tmp_path / "home" / "hub" / "checkpoints" / "vgg16-397923af.pth"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"not weights")
    output = end(start(tmp_path / "home", arguments(dataset, out, "--processes", 2)), 1)
    errors = [line for line in output.splitlines() if line.startswith(("Error", "process"))]
    assert len(errors) == 1 and "vgg16-397923af.pth" in errors[0]


def test_the_disk_runs_full(dataset: Path, torch_home: Path, tmp_path: Path) -> None:
    """A limit on the size of a file, below that of a checkpoint: writing fails in the middle, as on a full disk."""
    out = tmp_path / "run"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))

    output = end(start(torch_home, arguments(dataset, out, steps=4), preexec_fn=limit), 1)
    assert "warning: checkpoint step-000000002.pt could not be written (File too large); training goes on" in output
    assert "step       4 of 4" in output
    assert output.strip().splitlines()[-1] == f"Error: {out / 'model.safetensors'}: File too large"
    assert not list(out.rglob("*.pt")) and not list(out.rglob("*.tmp"))
    assert "going on" not in finish(*arguments(dataset, out, steps=4))


def test_no_option_is_taken_for_one_of_torchrun() -> None:
    """It looks for its own options, and abbreviations of them, in all of its command line."""
    from torch.distributed.run import get_args_parser

    for command in (train, evaluate):
        for option in (name for parameter in command.params for name in parameter.opts if name.startswith("--")):
            words = [command.name, option, "x"]
            found = get_args_parser().parse_args(["--no-python", "lmr", *words])
            assert found.training_script_args == words


def test_two_runs_in_one_folder(dataset: Path, tmp_path: Path) -> None:
    with claim_run(tmp_path / "run"):
        result = call(*arguments(dataset, tmp_path / "run"))
    assert result.exit_code == 1
    assert "another lmr train is at work in this folder; wait for it, stop it, or use another --out" in result.output


def test_a_run_that_begins_with_a_model_goes_on_with_it_only(dataset: Path, whole: Path, tmp_path: Path) -> None:
    first = whole / "model.safetensors"
    out, pieces = tmp_path / "run", tmp_path / "pieces"
    assert f"beginning with {first}" in finish(
        *arguments(dataset, out, "--start-from", first, warmup=0, lr=1e-5, steps=4)
    )
    # A small rate: it is near the model it began with, far from one drawn by the seed.
    apart = max((weights(out)[name] - value).abs().max() for name, value in weights(whole).items())
    assert 0 < apart < 1e-3
    provenance = load_checkpoint(out / "model.safetensors").provenance
    assert provenance["start"] == provenance["matching"] == f"model.safetensors, sha256 {sha256_file(first)}"
    shutil.copytree(out, pieces)
    for path in checkpoints(pieces / "checkpoints")[1:]:
        path.unlink()
    words = arguments(dataset, pieces, warmup=0, lr=1e-5, steps=4)
    result = call(*words)
    assert result.exit_code == 1 and "began with another --start-from" in result.output
    assert "going on after step 2" in finish(*words, "--start-from", first)
    assert all(torch.equal(weights(pieces)[name], value) for name, value in weights(out).items())
    both = call(*arguments(dataset, tmp_path / "both", "--start-from", first, "--matcher", first))
    assert both.exit_code == 2 and "give one of them" in both.output


def test_a_run_does_not_change_its_recipe_on_the_way(dataset: Path, whole: Path) -> None:
    result = call(*arguments(dataset, whole, lr=0.5))
    assert result.exit_code == 1
    assert (
        "the run began with another recipe (lr was 0.001 and is 0.5); use the same, or another --out" in result.output
    )
    result = call(*arguments(dataset, whole, "--resume", "never"))
    assert result.exit_code == 1 and "holds a run of step-000000012; go on with --resume auto" in result.output
    result = call(*arguments(dataset, whole, "--resume", "nothing.pt"))
    assert result.exit_code == 1 and "--resume nothing.pt: no such checkpoint" in result.output
    finish(*arguments(dataset, whole, log_every=7))  # at its end already


def test_going_back_to_an_earlier_checkpoint(dataset: Path, whole: Path, tmp_path: Path) -> None:
    """Whatever name the file is given by; and nothing is dropped for a file that can not be read."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    names = [path.name for path in checkpoints(out / "checkpoints")]
    first = out / "checkpoints" / names[0]
    first.write_bytes(first.read_bytes()[:1000])
    result = call(*arguments(dataset, out, "--resume", first))
    assert result.exit_code == 1 and [path.name for path in checkpoints(out / "checkpoints")] == names
    shutil.copy(whole / "checkpoints" / names[0], first)
    back = out / "checkpoints" / ".." / "checkpoints" / names[0]
    assert "going on after step 6 (" in finish(*arguments(dataset, out, "--resume", back, checkpoint_every=100))
    assert [path.name for path in checkpoints(out / "checkpoints")] == [names[0], names[-1]]
    assert all(torch.equal(value, weights(out)[name]) for name, value in weights(whole).items())


def test_another_dataset_is_refused(whole: Path, tmp_path: Path, dataset: Path) -> None:
    facts = json.loads((whole / "recipe.json").read_text())
    facts["dataset"]["fingerprint"] = "0" * 16
    other = tmp_path / "run"
    (other / "checkpoints").mkdir(parents=True)
    (other / ".lmr-run").touch()
    (other / "recipe.json").write_text(json.dumps(facts))
    (other / "checkpoints" / "step-000000002.pt").touch()
    result = call(*arguments(dataset, other))
    assert result.exit_code == 1
    assert "the run began with another dataset" in result.output and result.output.count("Error") == 1
    (other / "recipe.json").write_text('{"format": "lmr-run", "version": 1}')
    assert "recipe.json: not the recipe of a run of this version" in call(*arguments(dataset, other)).output


@pytest.mark.parametrize(
    ("words", "settings", "code", "text"),
    [
        ([], {"lern": 1}, 2, "unknown key 'lern'; known keys:"),
        (["--batch", 0], {}, 2, "batch: Input should be greater than or equal to 1 (given: 0)"),
        (["--gpus", 1, "--processes", 2], {}, 2, "give one of them"),
        ([], {"crop": 96}, 1, "crop 96: larger than the stored 64x64"),
        ([], {"batch": 8}, 1, "4 groups, too few for batches of 8"),
        (["--recipe", "none.toml"], {}, 2, "none.toml: no such recipe file"),
        (["--device", "cuda:7"], {}, 1, "--device cuda:7: not usable here"),
    ],
)
def test_bad_input_is_one_line(
    dataset: Path, tmp_path: Path, words: list[object], settings: dict[str, Any], code: int, text: str
) -> None:
    result = call(*arguments(dataset, tmp_path / "run", *words, **settings))
    assert result.exit_code == code, result.output
    assert text in result.output.splitlines()[-1]
    assert "Traceback" not in result.output


def test_what_is_no_dataset_and_no_run(tmp_path: Path, dataset: Path) -> None:
    assert "not a dataset of lmr-tools" in call(*arguments(tmp_path / "none", tmp_path / "run")).output
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.jpg").touch()
    result = call(*arguments(dataset, tmp_path / "full"))
    assert result.exit_code == 1 and "holds something that is not a training run" in result.output


def test_a_dry_run_shows_the_recipe_and_what_it_takes_and_writes_nothing(tmp_path: Path) -> None:
    result = call(*arguments(tmp_path / "none", tmp_path / "run", "--dry-run"))
    assert result.exit_code == 0, result.output
    for key in TrainConfig.model_fields:
        assert f"\n{key:<20} " in result.output
    with torch.device("meta"):
        network = MRefSR(MODEL_PRESETS["mrefsr-tiny"]).network
    count = sum(parameter.numel() for parameter in network.parameters())
    assert f"{count:,} trained" in result.output and "GB for each of 1 processes" in result.output
    assert not (tmp_path / "run").exists()


def test_the_command_offers_every_preset() -> None:
    assert set(module.PRESETS) == set(recipes.PRESETS)
