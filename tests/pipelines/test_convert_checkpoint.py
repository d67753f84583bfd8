"""`lmr convert-checkpoint`, from files to a file."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from lmr_tools.schema import LmrError
from mrefsr.checkpoints import (
    STORED,
    load_c2_matching,
    load_checkpoint,
    load_esrgan,
    load_masa,
    load_matcher,
    load_model,
)
from mrefsr.config import ModelConfig
from mrefsr.features import LAYERS, MatchingExtractor, VGGFeatures
from mrefsr.methods.c2_matching import c2_matching
from mrefsr.methods.esrgan import RRDBNet
from mrefsr.methods.masa import MASA
from mrefsr.network import RestorationNet
from pipelines import convert_checkpoint as module
from pipelines.convert_checkpoint import convert_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(convert_checkpoint, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 1
    assert isinstance(result.exception, LmrError)  # the group of commands turns it into one line
    return str(result.exception)


def save(path: Path, net: torch.nn.Module) -> dict[str, Tensor]:
    torch.save(net.state_dict(), path)
    return dict(net.state_dict())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random weights under the published names, one file of each sort."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    save(folder / "mrefsr.pth", RestorationNet(ModelConfig()))
    save(folder / "c2-matching.pth", c2_matching().network)
    save(folder / "masa.pth", MASA())
    save(folder / "esrgan.pth", RRDBNet(features=4, blocks=1, growth=2))
    save(folder / "extractor.pth", MatchingExtractor())
    vgg = VGGFeatures().state_dict()
    torch.save({f"vgg.{name.replace('model.', 'vgg_net.')}": value for name, value in vgg.items()}, folder / "corr.pth")
    state = {
        f"features.{place}.{kind}": vgg[f"model.{layer}.{kind}"]
        for layer, (place, _, _) in LAYERS.items()
        for kind in ("weight", "bias")
    }
    above = {f"features.{place}.weight": torch.zeros(1) for place in (12, 14, 16, 19)}
    hollow = {"classifier.0.weight": torch.zeros(1).expand(4096, 25088)}
    torch.save(state | above | hollow, folder / "vgg19.pth")
    torch.save(state | {f"features.{place}.weight": torch.zeros(1) for place in (12, 14, 17, 19)}, folder / "vgg16.pth")
    return {path.stem: path for path in folder.iterdir()}


def test_kinds_are_those_of_the_format() -> None:
    assert module.KINDS == STORED


@pytest.mark.parametrize(("kind", "load"), [("masa", load_masa), ("esrgan", load_esrgan)])
def test_single_network(
    tmp_path: Path, files: dict[str, Path], kind: str, load: Callable[[Path], torch.nn.Module]
) -> None:
    out = tmp_path / "deep" / "out.safetensors"
    result = run("--kind", kind, files[kind], out)
    assert result.exit_code == 0, result.output
    assert f"network: {kind}.pth, " in result.output
    assert hashlib.sha256(out.read_bytes()).hexdigest() in result.output
    state = torch.load(files[kind], weights_only=True)
    loaded = load(out).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_an_extractor_alone_becomes_a_matcher(tmp_path: Path, files: dict[str, Path]) -> None:
    out = tmp_path / "matcher.safetensors"
    result = run("--kind", "matcher", files["extractor"], out)
    assert result.exit_code == 0, result.output
    assert "extractor: extractor.pth, 24 tensors" in result.output
    state, loaded = torch.load(files["extractor"], weights_only=True), load_matcher(out).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    for wrong, text in (("mrefsr", "--kind mrefsr"), ("vgg19", "--vgg19")):
        line = refused("--kind", "matcher", files[wrong], tmp_path / "no.safetensors")
        assert f"holds weights for {text}, not for kind matcher" in line


@pytest.mark.parametrize("vgg", ["vgg19", "corr"])
@pytest.mark.parametrize(("kind", "load"), [("mrefsr", load_model), ("c2-matching", load_c2_matching)])
def test_matching_network(
    tmp_path: Path, files: dict[str, Path], kind: str, load: Callable[[Path], torch.nn.Module], vgg: str
) -> None:
    out = tmp_path / "out.safetensors"
    arguments = ("--kind", kind, files[kind], "--extractor", files["extractor"], "--vgg19", files[vgg], out, "--json")
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    summary = json.loads(result.output)
    assert summary["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert [source["part"] for source in summary["sources"]] == ["network", "extractor", "transfer"]
    for source in summary["sources"]:
        file = next(path for path in files.values() if path.name == source["file"])
        assert source["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    model = load(out)
    for part, name in (("network", kind), ("extractor", "extractor")):
        state = torch.load(files[name], weights_only=True)
        loaded = model.get_submodule(part).state_dict()
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[name], value) for name, value in state.items())
    transfer = model.get_submodule("transfer").state_dict()
    assert torch.equal(transfer["mean"], VGGFeatures().mean)
    published = torch.load(files["corr"], weights_only=True)
    for layer in LAYERS:
        assert torch.equal(transfer[f"model.{layer}.weight"], published[f"vgg.vgg_net.{layer}.weight"])
    assert load_checkpoint(out).provenance["sources"] == summary["sources"]
    before = out.read_bytes()
    assert run(*arguments, "--force").exit_code == 0
    assert out.read_bytes() == before


def test_missing_files_are_named_together(
    tmp_path: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    line = refused("--kind", "mrefsr", files["mrefsr"], tmp_path / "out.safetensors")
    assert "feature_extraction.pth" in line
    assert str(tmp_path / "hub" / "checkpoints" / "vgg19-dcbb9e9d.pth") in line
    # what torchvision has fetched already is found
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "vgg19-dcbb9e9d.pth").write_bytes(files["vgg19"].read_bytes())
    result = run("--kind", "mrefsr", files["mrefsr"], "--extractor", files["extractor"], tmp_path / "out.safetensors")
    assert result.exit_code == 0, result.output
    assert "transfer: vgg19-dcbb9e9d.pth" in result.output


def test_files_in_the_wrong_place_are_recognised(tmp_path: Path, files: dict[str, Path]) -> None:
    out = tmp_path / "out.safetensors"
    extra = ("--extractor", files["extractor"], "--vgg19", files["vgg19"])
    line = refused("--kind", "mrefsr", files["c2-matching"], *extra, out)
    assert "holds weights for --kind c2-matching, not for kind mrefsr" in line
    line = refused("--kind", "c2-matching", files["mrefsr"], *extra, out)
    assert "holds weights for --kind mrefsr, not for kind c2-matching" in line
    line = refused("--kind", "mrefsr", files["extractor"], *extra, out)
    assert "holds weights for --extractor, not for kind mrefsr" in line
    line = refused("--kind", "mrefsr", files["mrefsr"], "--extractor", files["vgg19"], "--vgg19", files["vgg19"], out)
    assert "holds weights for --vgg19, not for the extractor" in line
    line = refused(
        "--kind", "mrefsr", files["mrefsr"], "--extractor", files["extractor"], "--vgg19", files["vgg16"], out
    )
    assert "this is VGG16" in line
    assert "leave them out" in refused("--kind", "masa", files["masa"], "--extractor", files["extractor"], out)
    assert not out.exists()


def test_nothing_is_overwritten_unasked(tmp_path: Path, files: dict[str, Path]) -> None:
    out = tmp_path / "out.safetensors"
    out.write_text("precious")
    assert "exists already" in refused("--kind", "esrgan", files["esrgan"], out)
    assert "one of the files to convert" in refused("--kind", "esrgan", out, out, "--force")
    assert out.read_text() == "precious"
    assert "exists already" not in refused("--kind", "masa", files["esrgan"], out, "--force")
    assert out.read_text() == "precious"  # a failed conversion leaves what was there
    assert run("--kind", "esrgan", files["esrgan"], out, "--force").exit_code == 0
    assert load_checkpoint(out).kind == "esrgan"
    assert f"name it {tmp_path / 'out.safetensors'}" in refused(
        "--kind", "esrgan", files["esrgan"], tmp_path / "out.pth"
    )
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    assert "is a folder" in refused("--kind", "esrgan", files["esrgan"], folder, "--force")


def test_usage(files: dict[str, Path]) -> None:
    assert run("--kind", "swinir", files["masa"], "out.safetensors").exit_code == 2
    assert run(files["masa"], "out.safetensors").exit_code == 2
    assert isinstance(convert_checkpoint, click.Command)
    text = run("--help").output
    assert "mrefsr|c2-matching|masa|esrgan" in text
    assert "NET.pth" in text


def test_the_command_is_light_to_import() -> None:
    code = "import sys, pipelines.convert_checkpoint; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0
