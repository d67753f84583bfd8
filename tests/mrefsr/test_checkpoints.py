"""The project's own checkpoint format: what is written is read back, and nothing else is."""

from __future__ import annotations

import dataclasses
import errno
import json
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lmr_tools.schema import LmrError
from mrefsr.checkpoints import (
    HEADER,
    Checkpoint,
    load_c2_matching,
    load_checkpoint,
    load_esrgan,
    load_masa,
    load_model,
    save_checkpoint,
    save_model,
)
from mrefsr.config import MODEL_PRESETS, ModelConfig
from mrefsr.methods.c2_matching import c2_matching
from mrefsr.methods.esrgan import RRDBNet
from mrefsr.methods.masa import MASA
from mrefsr.model import MRefSR

SMALL = {"features": 4, "blocks": 1, "growth": 2}


def small_checkpoint(seed: int = 0) -> Checkpoint:
    """A tiny RRDBNet of random weights."""
    net = RRDBNet(**SMALL)
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(value.shape, generator=generator) for name, value in net.state_dict().items()}
    return Checkpoint(kind="esrgan", config=dict(SMALL), parts={"network": state}, provenance={"made": "in a test"})


def same(a: Checkpoint, b: Checkpoint) -> bool:
    plain = (a.kind, a.config, a.provenance, list(a.parts)) == (b.kind, b.config, b.provenance, list(b.parts))
    return plain and all(
        a.parts[part].keys() == b.parts[part].keys()
        and all(torch.equal(a.parts[part][name], b.parts[part][name]) for name in a.parts[part])
        for part in a.parts
    )


def rewritten(source: Path, target: Path, **changes: object) -> Path:
    """The same tensors under a changed header."""
    with safetensors.safe_open(source, framework="pt") as file:
        header = json.loads(file.metadata()[HEADER]) | changes
    text = json.dumps(header, sort_keys=True)
    safetensors.torch.save_file(safetensors.torch.load_file(source), target, metadata={HEADER: text})
    return target


def test_round_trip_is_equal_and_byte_identical(tmp_path: Path) -> None:
    checkpoint = small_checkpoint()
    save_checkpoint(tmp_path / "a.safetensors", checkpoint)
    loaded = load_checkpoint(tmp_path / "a.safetensors")
    assert same(loaded, checkpoint)
    save_checkpoint(tmp_path / "b.safetensors", loaded)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_who_may_read_it_is_as_of_any_file(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.safetensors", small_checkpoint())
    (tmp_path / "b").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_disk_that_runs_full_leaves_the_old_file(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, small_checkpoint())
    old, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, limits[1]))
    try:
        with pytest.raises(OSError) as error:
            save_checkpoint(path, small_checkpoint(seed=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (error.value.errno, error.value.filename) == (errno.EFBIG, str(path))
    assert path.read_bytes() == old and [file.name for file in tmp_path.iterdir()] == [path.name]


def test_bytes_do_not_depend_on_the_order_of_tensors_or_keys(tmp_path: Path) -> None:
    checkpoint = small_checkpoint()
    turned = dataclasses.replace(
        checkpoint,
        config=dict(reversed(checkpoint.config.items())),
        parts={"network": dict(reversed(checkpoint.parts["network"].items()))},
    )
    save_checkpoint(tmp_path / "a.safetensors", checkpoint)
    save_checkpoint(tmp_path / "b.safetensors", turned)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    path, damaged = tmp_path / "a.safetensors", tmp_path / "damaged.safetensors"
    save_checkpoint(path, small_checkpoint())
    whole = path.read_bytes()
    checkpoint = load_checkpoint(path)
    for place in range(0, len(whole), 37):
        changed = bytearray(whole)
        changed[place] ^= 0x11
        damaged.write_bytes(changed)
        try:
            read = load_checkpoint(damaged)
        except LmrError as error:
            assert str(damaged) in str(error)
            assert "\n" not in str(error)
        else:
            assert same(read, checkpoint), place  # only the header's padding may change unnoticed


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_cut_off_files_are_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, small_checkpoint())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(LmrError, match=r"a\.safetensors: not a readable checkpoint"):
        load_checkpoint(path)


def test_other_files_are_named_for_what_they_are(tmp_path: Path) -> None:
    plain, packed, old = tmp_path / "hub.safetensors", tmp_path / "net.pth", tmp_path / "old.pth"
    safetensors.torch.save_file({"weight": torch.zeros(2)}, plain)
    torch.save({"weight": torch.zeros(2)}, packed)
    old.write_bytes(pickle.dumps({"weight": 1}))
    with pytest.raises(LmrError, match="not a checkpoint of lmr-tools"):
        load_checkpoint(plain)
    for path in (packed, old):
        with pytest.raises(LmrError, match="a PyTorch file; turn it into a checkpoint with lmr convert-checkpoint"):
            load_checkpoint(path)
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(LmrError, match="no such file"):
            load_checkpoint(path)


def test_wrong_kind_version_and_header_are_refused(tmp_path: Path) -> None:
    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_checkpoint(path, small_checkpoint())
    with pytest.raises(LmrError, match="holds weights of kind esrgan, but mrefsr is needed"):
        load_model(path)
    with pytest.raises(LmrError, match="checkpoint format 2, this version of lmr-tools reads 1"):
        load_checkpoint(rewritten(path, other, version=2))
    malformed: list[dict[str, object]]
    malformed = [{"kind": "swinir"}, {"config": []}, {"parts": "network"}, {"provenance": None}]
    for changes in malformed:
        with pytest.raises(LmrError, match="damaged header"):
            load_checkpoint(rewritten(path, other, **changes))
    changed: list[dict[str, object]]
    changed = [{"config": {**SMALL, "blocks": 2}}, {"provenance": {"made": "elsewhere"}}, {"sha256": None}]
    for changes in changed:
        with pytest.raises(LmrError, match="damaged, its contents"):
            load_checkpoint(rewritten(path, other, **changes))
    for text in ("[1]", "{", "[" * 100_000, '{"a": NaN}', '{"b": 1, "a": 1e999}'):
        safetensors.torch.save_file({"network.a": torch.zeros(1)}, other, metadata={HEADER: text})
        with pytest.raises(LmrError, match=r"not a readable checkpoint|damaged header"):
            load_checkpoint(other)


def test_unknown_kind_and_values_that_are_no_json_are_not_written(tmp_path: Path) -> None:
    checkpoint = small_checkpoint()
    for wrong in ({"kind": "swinir"}, {"provenance": {"psnr": float("nan")}}):
        with pytest.raises(ValueError):
            save_checkpoint(tmp_path / "a.safetensors", dataclasses.replace(checkpoint, **wrong))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("esrgan", {**SMALL, "blocks": 10**9}),
        ("esrgan", {**SMALL, "features": 10**9}),
        ("esrgan", {"features": "many"}),
        ("esrgan", {"colour": "red"}),
        ("mrefsr", {"content_blocks": 10**5}),
        ("mrefsr", {"blocks": [1, 10**5, 1]}),
        ("mrefsr", {"blocks": 3}),
        ("mrefsr", {"colour": "red"}),
        ("masa", {"nf": 10**9}),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused_before_it_is_built(
    tmp_path: Path, kind: str, config: dict[str, object]
) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, dataclasses.replace(small_checkpoint(), kind=kind, config=config))
    load = {"esrgan": load_esrgan, "masa": load_masa, "mrefsr": load_model}[kind]
    with pytest.raises(LmrError, match=r"a\.safetensors: its configuration"):
        load(path)


def test_weights_that_do_not_fit_their_configuration_are_listed(tmp_path: Path) -> None:
    checkpoint = small_checkpoint()
    state = dict(checkpoint.parts["network"])
    del state["HRconv.bias"]
    state["extra"] = torch.zeros(1)
    state["conv_last.bias"] = torch.zeros(5)
    save_checkpoint(tmp_path / "a.safetensors", dataclasses.replace(checkpoint, parts={"network": state}))
    with pytest.raises(LmrError) as caught:
        load_esrgan(tmp_path / "a.safetensors")
    assert "1 missing: HRconv.bias; 1 unexpected: extra; 1 of another shape: conv_last.bias [5] instead of [3]" in str(
        caught.value
    )


def test_single_networks_come_back_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rrdb, masa = RRDBNet(**SMALL), MASA(nf=4)
    for kind, net, config in (("esrgan", rrdb, SMALL), ("masa", masa, {"nf": 4})):
        parts = {"network": dict(net.state_dict())}
        save_checkpoint(tmp_path / f"{kind}.safetensors", Checkpoint(kind=kind, config=config, parts=parts))
    loaded = load_esrgan(tmp_path / "esrgan.safetensors")
    lr = torch.rand(1, 3, 8, 8)
    assert not loaded.training
    assert torch.equal(loaded(lr), rrdb(lr))
    ref = torch.rand(1, 3, 32, 32)
    assert torch.equal(
        load_masa(tmp_path / "masa.safetensors")(lr, ref, ref[..., ::4, ::4]), masa(lr, ref, ref[..., ::4, ::4])
    )


def test_mrefsr_model_comes_back_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MRefSR(MODEL_PRESETS["mrefsr-tiny"]).eval()  # random weights throughout
    path, again = tmp_path / "tiny.safetensors", tmp_path / "again.safetensors"
    save_model(path, model, {"trained_by": "nobody"})
    loaded = load_model(path)
    assert loaded.config == model.config
    assert not loaded.training
    lr, up, refs = torch.rand(1, 3, 9, 8), torch.rand(1, 3, 36, 32), torch.rand(1, 2, 3, 32, 40)
    with torch.no_grad():
        torch.testing.assert_close(loaded(lr, up, refs), model(lr, up, refs), rtol=0, atol=1e-6)
    strides = {name: value.stride() for name, value in model.state_dict().items()}
    assert {name: value.stride() for name, value in loaded.state_dict().items()} == strides
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if name.startswith("network.")
    }
    save_model(again, loaded, {"trained_by": "nobody"})
    assert path.read_bytes() == again.read_bytes()


def test_c2_matching_comes_back_whole(tmp_path: Path) -> None:
    model = c2_matching()
    parts = {part: dict(module.state_dict()) for part, module in model.named_children()}
    path = tmp_path / "c2.safetensors"
    save_checkpoint(path, Checkpoint(kind="c2-matching", config={}, parts=parts))
    loaded = load_c2_matching(path)
    assert loaded.config == ModelConfig()
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    with pytest.raises(LmrError, match="holds weights of kind c2-matching, but mrefsr is needed"):
        load_model(path)
    with pytest.raises(ValueError, match="not the MRefSR network"):
        save_model(tmp_path / "as_mrefsr.safetensors", loaded, {})
