"""VGG features against torchvision's own layers, and weight files with everything that can be wrong with them."""

import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from lmr_tools.schema import LmrError
from mrefsr.features import MatchingExtractor, VGGFeatures, load_vgg_weights


def torchvision_layers(letter: str, seed: int) -> nn.Sequential:
    """Random VGG convolutions as torchvision builds them, biases included."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: nn.Sequential = make_layers(cfgs[letter])[:12]
        for layer in layers:
            if isinstance(layer, nn.Conv2d) and layer.bias is not None:
                nn.init.normal_(layer.bias, 0, 0.1)
    return layers


def write_weights(layers: nn.Sequential, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({f"features.{name}": value for name, value in layers.state_dict().items()}, path)


def image(*size: int) -> Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("backbone", "letter"), [("vgg16", "D"), ("vgg19", "E")])
@pytest.mark.parametrize("size", [(24, 20), (17, 31)])
def test_features_are_torchvisions(backbone: str, letter: str, size: tuple[int, int], tmp_path: Path) -> None:
    layers = torchvision_layers(letter, 1)
    write_weights(layers, tmp_path / "vgg.pth")
    vgg = VGGFeatures()
    load_vgg_weights(vgg, backbone, tmp_path / "vgg.pth")  # type: ignore[arg-type]
    x = image(*size)
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    normalised = (x - mean) / deviation
    with torch.no_grad():
        relu3_1, relu2_1 = vgg.transfer(x)
        torch.testing.assert_close(vgg.relu1_1(x), layers[:2](normalised.clone()))
        torch.testing.assert_close(relu2_1, layers[:7](normalised.clone()))
        torch.testing.assert_close(relu3_1, layers[:12](normalised.clone()))
        before_relu = layers[:11](normalised.clone())
        torch.testing.assert_close(vgg(x), before_relu)
    assert (before_relu < 0).any()


def test_each_image_has_its_own_copy() -> None:
    extractor = MatchingExtractor()
    first, second = extractor(image(16, 16), image(16, 16))
    assert not torch.equal(first, second)
    extractor.feature_extraction_image2.load_state_dict(extractor.feature_extraction_image1.state_dict())
    first, second = extractor(image(16, 16), image(16, 16))
    torch.testing.assert_close(first, second)


def test_imagenet_weights_come_from_the_torch_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    layers = torchvision_layers("D", 2)
    write_weights(layers, tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth")
    vgg = VGGFeatures()
    load_vgg_weights(vgg, "vgg16")
    assert torch.equal(vgg.state_dict()["model.conv3_1.weight"], layers.state_dict()["10.weight"])


def test_missing_weights_name_file_and_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("LMR_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(LmrError, match=r"vgg19-dcbb9e9d\.pth") as caught:
        load_vgg_weights(VGGFeatures(), "vgg19")
    assert str(tmp_path / "hub" / "checkpoints") in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(LmrError, match=r"none\.pth: no such file"):
        load_vgg_weights(VGGFeatures(), "vgg16", tmp_path / "none.pth")


def test_damaged_or_foreign_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "vgg.pth"
    layers = torchvision_layers("D", 3)
    write_weights(layers, path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(LmrError, match=r"vgg\.pth: not a readable weight file"):
        load_vgg_weights(VGGFeatures(), "vgg16", path)
    torch.save({"features.0.weight": torch.zeros(64, 3, 5, 5)}, path)
    with pytest.raises(LmrError, match=r"features\.0\.weight"):
        load_vgg_weights(VGGFeatures(), "vgg16", path)
    torch.save([1, 2], path)
    with pytest.raises(LmrError, match="not a torchvision VGG"):
        load_vgg_weights(VGGFeatures(), "vgg16", path)


def test_a_refused_file_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "vgg.pth"
    layers = torchvision_layers("D", 4)
    torch.save({f"features.{k}": v for k, v in layers.state_dict().items() if not k.startswith("10.")}, path)
    vgg = VGGFeatures()
    before = {name: value.clone() for name, value in vgg.state_dict().items()}
    with pytest.raises(LmrError, match=r"features\.10\.weight"):
        load_vgg_weights(vgg, "vgg16", path)
    assert all(torch.equal(value, before[name]) for name, value in vgg.state_dict().items())
