"""The critic: published names and shapes, starting values, and what the clean one does otherwise."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mrefsr.checkpoints import shapes_of
from mrefsr.discriminator import Discriminator


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(batch: int, height: int = 40, width: int = 36) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=seeded(0))


def test_names_and_shapes_are_the_published_ones(shared: Path) -> None:
    published = json.loads((shared / "parity" / "keys_disc.json").read_text())
    assert shapes_of(Discriminator()) == {name: tuple(shape) for name, shape, _ in published}
    clean = shapes_of(Discriminator(clean=True))
    assert clean == {name: tuple(shape) for name, shape, _ in published if len(shape) == 4 or name in clean}
    assert not any(".running_" in name for name in clean)


@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("size", [(160, 160), (17, 33), (5, 4)])
def test_one_score_per_picture_of_any_size(clean: bool, size: tuple[int, int]) -> None:
    critic = Discriminator(clean=clean, generator=seeded(1)).eval()
    scores = critic(picture(3, *size))
    assert scores.shape == (3, 1, 1, 1)
    assert bool(((scores > 0) & (scores < 1)).all()) or clean


def test_a_clean_score_depends_on_its_own_picture_alone() -> None:
    a, b = picture(3), picture(3).clone()
    b[1:] = 1 - b[1:]
    clean, published = (Discriminator(clean=clean, generator=seeded(1)).train() for clean in (True, False))
    torch.testing.assert_close(clean(a)[0], clean(b)[0], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(published(a)[0], published(b)[0], rtol=1e-4, atol=1e-6)


def test_the_start_comes_from_the_generator() -> None:
    for clean in (False, True):
        first, again, other = (Discriminator(clean=clean, generator=seeded(seed)).state_dict() for seed in (1, 1, 2))
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not torch.equal(first["conv_block1.0.weight"], other["conv_block1.0.weight"])
        assert all(bool((value == 0).all()) for name, value in first.items() if name.endswith(".bias"))
    published = Discriminator(generator=seeded(1)).state_dict()
    assert float(published["conv_block5.3.weight"].std()) == pytest.approx(0.02, rel=0.01)
    assert float(published["conv_block5.4.weight"].mean()) == pytest.approx(1, abs=0.01)


def test_the_clean_start_keeps_the_signal_alive() -> None:
    critic = Discriminator(clean=True, generator=seeded(1))
    x = picture(2)
    deep = x
    with torch.no_grad():
        for number in range(1, 6):
            deep = critic.get_submodule(f"conv_block{number}")(deep)
    assert 0.1 < float(deep.std()) / float(x.std()) < 10
