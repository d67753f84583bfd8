"""All methods behind one call: sizes, ranges, channel order, number of references, weights that do not fit."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from lmr_tools.images import resize, upscale
from lmr_tools.schema import LmrError
from mrefsr.checkpoints import KINDS, Checkpoint, save_checkpoint, save_model
from mrefsr.config import MODEL_PRESETS
from mrefsr.methods.c2_matching import c2_matching
from mrefsr.methods.esrgan import RRDBNet
from mrefsr.methods.masa import MASA
from mrefsr.model import MRefSR
from mrefsr.systems import METHODS, load_method

CPU = torch.device("cpu")
ESRGAN = {"features": 4, "blocks": 1, "growth": 2}


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """Smooth and coloured, so that channel order matters."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return resize(small, width, height)


def tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.astype(np.float32) / 255).permute(2, 0, 1)[None].contiguous()


def eight_bits(image: torch.Tensor) -> np.ndarray:
    return (image[0].permute(1, 2, 0).clamp(0, 1) * 255).round().numpy().astype(np.uint8)


@pytest.fixture(scope="module")
def nets() -> dict[str, torch.nn.Module]:
    """Stand-ins of random weights."""
    torch.manual_seed(3)
    return {
        "esrgan": RRDBNet(**ESRGAN).eval(),
        "masa": MASA(nf=4).eval(),
        "c2-matching": c2_matching().eval(),
        # Matches that are not refined: else made-up references, which agree with nothing, would be refused.
        "mrefsr": MRefSR(dataclasses.replace(MODEL_PRESETS["mrefsr-tiny"], refine_matches=False)).eval(),
    }


@pytest.fixture(scope="module")
def files(nets: dict[str, torch.nn.Module], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("weights")
    for kind, config in (("esrgan", ESRGAN), ("masa", {"nf": 4})):
        parts = {"network": dict(nets[kind].state_dict())}
        save_checkpoint(folder / f"{kind}.safetensors", Checkpoint(kind=kind, config=config, parts=parts))
    parts = {part: dict(module.state_dict()) for part, module in nets["c2-matching"].named_children()}
    save_checkpoint(folder / "c2-matching.safetensors", Checkpoint(kind="c2-matching", config={}, parts=parts))
    assert isinstance(nets["mrefsr"], MRefSR)
    save_model(folder / "mrefsr.safetensors", nets["mrefsr"], {})
    return {path.stem: path for path in folder.iterdir()}


def expected(name: str, net: torch.nn.Module, lr: np.ndarray, reference: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        if name == "esrgan":
            return eight_bits(net(tensor(lr)))
        if name == "masa":  # as its published test does: pictures in OpenCV's order, B, G, R
            small = resize(reference, reference.shape[1] // 4, reference.shape[0] // 4)
            pictures = [tensor(np.ascontiguousarray(image[..., ::-1])) for image in (lr, reference, small)]
            return eight_bits(net(*pictures))[..., ::-1]
        return eight_bits(net(tensor(lr), tensor(upscale(lr)), tensor(reference)[:, None]))


@pytest.mark.parametrize("name", ["esrgan", "masa", "c2-matching", "mrefsr"])
def test_the_call_is_the_network(name: str, nets: dict[str, torch.nn.Module], files: dict[str, Path]) -> None:
    lr, reference = picture(1, 12, 16), picture(2, 48, 64)
    restore = load_method(name, files[name], CPU)
    sr = restore(lr, [reference] if METHODS[name].references != 0 else [])
    wanted = expected(name, nets[name], lr, reference)
    assert sr.dtype == np.uint8 and sr.shape == (48, 64, 3)
    # Tiles and strips round floats otherwise, so a level may fall to the other side.
    assert np.abs(sr.astype(int) - wanted).max() <= 1
    assert (wanted > 0).mean() > 0.02 and (wanted < 255).mean() > 0.02


@pytest.mark.parametrize("name", ["masa", "c2-matching", "mrefsr"])
@pytest.mark.parametrize("size", [(45, 71), (9, 30)])
def test_references_of_any_size(name: str, size: tuple[int, int], files: dict[str, Path]) -> None:
    sr = load_method(name, files[name], CPU)(picture(1, 11, 13), [picture(2, *size)])
    assert sr.shape == (44, 52, 3)


def test_numbers_of_references(files: dict[str, Path]) -> None:
    lr, references = picture(1, 8, 8), [picture(2, 32, 32), picture(3, 40, 36), picture(4, 28, 32)]
    mrefsr = load_method("mrefsr", files["mrefsr"], CPU)
    outputs = [mrefsr(lr, references[:count]) for count in range(4)]
    assert all(np.any(a != b) for a, b in itertools.pairwise(outputs))
    for name in ("masa", "c2-matching"):
        restore = load_method(name, files[name], CPU)
        for count in (0, 2):
            with pytest.raises(LmrError, match=f"takes one reference, not {count}"):
                restore(lr, references[:count])
    np.testing.assert_array_equal(load_method("bicubic", None, CPU)(lr, references), upscale(lr))


def test_weights_that_do_not_fit(files: dict[str, Path]) -> None:
    with pytest.raises(LmrError, match=r"bicubic has no weights; leave the option out"):
        load_method("bicubic", files["esrgan"], CPU)
    for name in METHODS:
        if name != "bicubic":
            with pytest.raises(LmrError, match=f"{name} needs its checkpoint.*convert-checkpoint --kind {name}"):
                load_method(name, None, CPU)
    with pytest.raises(LmrError, match="holds weights of kind esrgan, but masa is needed"):
        load_method("masa", files["esrgan"], CPU)


def test_every_kind_of_checkpoint_has_its_method() -> None:
    assert set(METHODS) == {"bicubic", *KINDS}
