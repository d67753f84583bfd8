"""What a run is before its first step and between two: first weights, checkpoints and what they refuse."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lmr_tools.schema import LmrError
from mrefsr.checkpoints import save_model
from mrefsr.training_state import load_state, new_training, save_state, to_dict
from tests.mrefsr.training_fixture import ALONE, begin, fake_weights, short, weights_of

FACTS = {"dataset": "d"}


@pytest.fixture(autouse=True)
def stand_ins(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("torch") / "home"
    fake_weights(folder)
    monkeypatch.setenv("TORCH_HOME", str(folder))
    yield


def test_a_run_begins_with_a_model_and_asks_for_no_other_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = begin(seed=7)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    save_model(tmp_path / "other.safetensors", other.model, {"by": "test"})
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing"))
    training = new_training(short(), ALONE.device, start=tmp_path / "other.safetensors")
    for name, value in other.model.state_dict().items():  # the frozen parts, too
        assert torch.equal(training.model.state_dict()[name], value), name
    for name, value in weights_of(training).items():
        assert torch.equal(value, other.model.state_dict()["network." + name.split(".", 1)[1]]), name
    assert training.model.training and training.step == 0 and not training.optimiser.state
    learns = {id(parameter) for group in training.optimiser.param_groups for parameter in group["params"]}
    assert learns == {id(parameter) for parameter in training.model.network.parameters()}
    assert all(parameter.requires_grad for parameter in training.model.network.parameters())
    assert not any(parameter.requires_grad for parameter in training.averaged.network.parameters())


def test_a_model_of_another_shape_is_no_start(tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    save_model(path, begin().model, {"by": "test"})
    with pytest.raises(LmrError, match=r"tiny.safetensors: another network .*channels is 16, not 64; .* and 7 more"):
        new_training(short(model="mrefsr", backbone="vgg16"), ALONE.device, start=path)
    with pytest.raises(LmrError, match=r"another network than the recipe's \(backbone is vgg16, not vgg19\)"):
        new_training(short(backbone="vgg19"), ALONE.device, start=path)


def test_torch_tells_of_a_full_disk(tmp_path: Path) -> None:
    """Its writer hides the reason behind a RuntimeError; /dev/full is a disk without room."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    path = tmp_path / "step-000000001.pt"
    path.write_bytes(b"old")
    (tmp_path / f".{path.name}.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError) as error:
        save_state(path, {"a": torch.zeros(1_000_000)})
    assert error.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "not a readable checkpoint"),
        (lambda path: torch.save({"a": 1}, path), "not a checkpoint of lmr train"),
        (lambda path: path.unlink(), "no such checkpoint"),
    ],
)
def test_a_damaged_checkpoint_is_named(tmp_path: Path, damage: Any, text: str) -> None:
    path = tmp_path / "step-000000000.pt"
    save_state(path, to_dict(begin(), FACTS))
    damage(path)
    with pytest.raises(LmrError, match=text) as error:
        load_state(path, begin(), FACTS)
    assert str(path) in str(error.value)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "step-000000000.pt"
    save_state(path, to_dict(begin(), FACTS))
    with pytest.raises(LmrError, match="crop was 32 and is 48"):
        load_state(path, begin(crop=48), FACTS)
    with pytest.raises(LmrError, match=r"began with another dataset \(d, now e\); use the same"):
        load_state(path, begin(), {"dataset": "e"})
    constant = begin(schedule="constant")  # else its number of steps may not change at all
    constant.step = 4
    save_state(path, to_dict(constant, FACTS))
    with pytest.raises(LmrError, match="has 4 steps behind it, more than the 3 asked for; use another --out"):
        load_state(path, begin(schedule="constant", steps=3), FACTS)
