"""Published .pth files: what is honest is read, what is hostile or wrong is one line that says why."""

from __future__ import annotations

import os
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lmr_tools.schema import LmrError
from mrefsr.checkpoints import load_esrgan, save_checkpoint
from mrefsr.foreign import convert, read_pth
from mrefsr.methods.esrgan import RRDBNet, rename

SMALL = {"features": 4, "blocks": 2, "growth": 2}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """A tiny RRDBNet of random weights, under ESRGAN's names."""
    torch.manual_seed(0)
    return dict(RRDBNet(**SMALL).state_dict())


def basicsr(name: str) -> str:
    for own, theirs in (("RRDB_trunk", "body"), ("RDB", "rdb"), ("trunk_conv", "conv_body"), ("upconv", "conv_up")):
        name = name.replace(own, theirs)
    return name.replace("HRconv", "conv_hr")


def original(name: str) -> str:
    layer, _, kind = name.rpartition(".")
    places = {"conv_first": 0, "trunk_conv": "1.sub.2", "upconv1": 3, "upconv2": 6, "HRconv": 8, "conv_last": 10}
    if layer in places:
        return f"model.{places[layer]}.{kind}"
    return layer.replace("RRDB_trunk", "model.1.sub") + f".0.{kind}"


@pytest.mark.parametrize(("naming", "renamed"), [("esrgan", str), ("basicsr", basicsr), ("original", original)])
@pytest.mark.parametrize("entry", ["flat", "params", "params_ema", "module"])
@pytest.mark.parametrize("packed", [True, False])
def test_every_naming_and_wrapper_gives_the_same_network(
    tmp_path: Path, state: dict[str, Tensor], naming: str, renamed: Callable[[str], str], entry: str, packed: bool
) -> None:
    prefix = "module." if entry == "module" else ""
    theirs: object = OrderedDict((prefix + renamed(name), value) for name, value in state.items())
    if entry.startswith("params"):
        theirs = {entry: theirs, "iter": 5}
    torch.save(theirs, tmp_path / "net.pth", _use_new_zipfile_serialization=packed)
    checkpoint = convert("esrgan", tmp_path / "net.pth")
    source = checkpoint.provenance["sources"][0]
    assert source["naming"] == naming
    assert source["entry"] == ("flat, module." if entry == "module" else entry)
    assert checkpoint.config == SMALL
    assert list(checkpoint.parts["network"]) == list(state)
    assert all(torch.equal(checkpoint.parts["network"][name], value) for name, value in state.items())
    save_checkpoint(tmp_path / "net.safetensors", checkpoint)
    lr = torch.rand(1, 3, 5, 6, generator=torch.Generator().manual_seed(1))
    net = RRDBNet(**SMALL)
    net.load_state_dict(state)
    assert torch.equal(load_esrgan(tmp_path / "net.safetensors")(lr), net(lr))


def test_all_published_names_are_known() -> None:
    with torch.device("meta"):
        names = list(RRDBNet().state_dict())
    for naming, renamed in (
        ("esrgan", str),
        ("basicsr", basicsr),
        ("original", lambda n: original(n).replace(".2.w", ".2.w")),
    ):
        theirs = {renamed(name): name for name in names}
        assert len(theirs) == 702
        assert rename(theirs) == (naming, theirs)


def test_averaged_weights_go_first_and_it_is_said(tmp_path: Path, state: dict[str, Tensor]) -> None:
    averaged = {name: value + 1 for name, value in state.items()}
    torch.save({"params": state, "params_ema": averaged}, tmp_path / "net.pth")
    checkpoint = convert("esrgan", tmp_path / "net.pth")
    assert torch.equal(checkpoint.parts["network"]["conv_first.bias"], averaged["conv_first.bias"])
    assert checkpoint.provenance["sources"][0]["entry"] == "params_ema (params is there too)"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(tmp_path: Path, state: dict[str, Tensor], dtype: torch.dtype) -> None:
    torch.save({name: value.to(dtype) for name, value in state.items()}, tmp_path / "net.pth")
    taken = convert("esrgan", tmp_path / "net.pth").parts["network"]
    for name, value in state.items():
        assert taken[name].dtype == torch.float32
        assert torch.equal(taken[name], value.to(dtype).float())


def refused(path: Path, kind: str = "esrgan", **files: Path) -> str:
    with pytest.raises(LmrError) as caught:
        convert(kind, path, **files)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 1200
    return line


def test_all_disagreements_are_listed_together(tmp_path: Path, state: dict[str, Tensor]) -> None:
    wrong = dict(state)
    for block in range(2):
        for layer in range(1, 5):
            del wrong[f"RRDB_trunk.{block}.RDB2.conv{layer}.bias"]
    wrong["conv_last.bias"] = torch.zeros(4)
    wrong["ema_decay"] = torch.zeros(1)
    torch.save(wrong, tmp_path / "net.pth")
    line = refused(tmp_path / "net.pth")
    assert "8 missing: RRDB_trunk.0.RDB2.conv1.bias, " in line
    assert "and 3 more; 1 unexpected: ema_decay; 1 of another shape: conv_last.bias [4] instead of [3]" in line


def test_one_tensor_under_two_names_is_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save(
        {**state, "conv_hr.bias": state["HRconv.bias"], "body.0.rdb1.conv1.bias": torch.zeros(2)}, tmp_path / "n.pth"
    )
    line = refused(tmp_path / "n.pth")
    assert "2 tensors are there under two names: HRconv.bias, RRDB_trunk.0.RDB1.conv1.bias" in line


class Payload:
    """A pickle that would make a file when it is loaded without care."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("packed", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, state: dict[str, Tensor], packed: bool) -> None:
    trace = tmp_path / "trace"
    content = {**state, "hook": Payload(trace)}
    torch.save(content, tmp_path / "net.pth", _use_new_zipfile_serialization=packed)
    line = refused(tmp_path / "net.pth")
    assert "refused, it holds code or objects (posix.mkdir)" in line
    assert not trace.exists()


@pytest.mark.parametrize("packed", [True, False])
def test_expanded_tensors_are_refused_before_they_take_room(
    tmp_path: Path, state: dict[str, Tensor], packed: bool
) -> None:
    terabytes = torch.zeros(1).expand(1 << 20, 1 << 20)
    torch.save({**state, "conv_last.weight": terabytes}, tmp_path / "a.pth", _use_new_zipfile_serialization=packed)
    assert "conv_last.weight [1048576, 1048576] instead of [3, 4, 3, 3]" in refused(tmp_path / "a.pth")
    one = torch.ones(1).expand(3, 4, 3, 3)  # the right shape, but hollow
    torch.save({**state, "conv_last.weight": one}, tmp_path / "b.pth", _use_new_zipfile_serialization=packed)
    assert "1 tensors claim more values than they have: conv_last.weight" in refused(tmp_path / "b.pth")


def repacked(source: Path, target: Path, change: dict[bytes, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """The same archive with bytes of its pickle replaced."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for member in old.infolist():
            data = old.read(member)
            if member.filename.endswith("data.pkl"):
                for before, after in change.items():
                    assert before in data
                    data = data.replace(before, after)
            new.writestr(member.filename, data)
    return target


def test_sizes_that_lie_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(77)}, tmp_path / "honest.pth")
    huge = b"\x8a\x06" + (1 << 40).to_bytes(6, "little")  # LONG1 instead of BININT1
    assert "not a readable PyTorch file" in refused(
        repacked(tmp_path / "honest.pth", tmp_path / "a.pth", {b"K\x4d": huge})
    )


def test_archives_that_unpack_to_more_are_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, tmp_path / "net.pth")
    bomb = repacked(tmp_path / "net.pth", tmp_path / "bomb.pth", {}, zipfile.ZIP_DEFLATED)
    assert "compressed inside" in refused(bomb)
    # the central directory may claim any size
    torch.save({"a": torch.zeros(77)}, tmp_path / "a.pth")
    data = bytearray((tmp_path / "a.pth").read_bytes())
    entry = data.index(b"PK\x01\x02")
    data[entry + 20 : entry + 28] = (1 << 30).to_bytes(4, "little") * 2
    (tmp_path / "a.pth").write_bytes(data)
    assert "claim more bytes than the file has" in refused(tmp_path / "a.pth")


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "net.pth"
    torch.save(state, path)
    whole = path.read_bytes()
    for length in (0, 3, 4, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "download it again" in refused(path)
    torch.save(state, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for length in (1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "download it again" in refused(path)
    path.write_bytes(b"<!DOCTYPE html><html>Sign in to download</html>")
    assert "not a PyTorch file" in refused(path)
    assert "no such file" in refused(tmp_path / "none.pth")
    assert "no such file" in refused(tmp_path)
    with path.open("wb") as file:
        file.truncate(5 << 30)  # sparse: takes no room
    assert "5.0 GB" in refused(path)


@pytest.mark.parametrize("packed", [True, False])
def test_damaged_bytes_never_end_in_a_traceback(tmp_path: Path, state: dict[str, Tensor], packed: bool) -> None:
    path = tmp_path / "net.pth"
    torch.save(dict(list(state.items())[:3]), path, _use_new_zipfile_serialization=packed)
    whole = path.read_bytes()
    refusals = 0
    for place in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[place] ^= 0x2A
        path.write_bytes(changed)
        try:
            read_pth(path)
        except LmrError as error:
            assert "\n" not in str(error)
            refusals += 1
    assert refusals > 20


def test_entries_that_are_no_plain_tensors_are_listed(tmp_path: Path, state: dict[str, Tensor]) -> None:
    strange = {
        "step": 7,
        "names": ["a"],
        "sparse": torch.zeros(3).to_sparse(),
        "counts": torch.zeros(3, dtype=torch.int64),
        "nowhere": torch.zeros(3, device="meta"),
    }
    torch.save({**state, **strange}, tmp_path / "net.pth")
    assert "5 entries are no floating-point tensors: step, names, sparse, counts, nowhere" in refused(
        tmp_path / "net.pth"
    )
    contents: list[object] = [[torch.zeros(1)], torch.zeros(1), {}, {"params": {}}]
    for content in contents:
        torch.save(content, tmp_path / "net.pth")
        assert "holds no dict of tensors" in refused(tmp_path / "net.pth")
    torch.save({1: torch.zeros(1)}, tmp_path / "net.pth")
    assert "1 entries are no floating-point tensors: 1;" in refused(tmp_path / "net.pth")


def test_nan_and_infinity_are_counted(tmp_path: Path, state: dict[str, Tensor]) -> None:
    first, last = state["conv_first.weight"].clone(), state["conv_last.bias"].clone()
    first.view(-1)[:5] = torch.nan
    last[1] = torch.inf
    torch.save({**state, "conv_first.weight": first, "conv_last.bias": last}, tmp_path / "net.pth")
    line = refused(tmp_path / "net.pth")
    assert "6 values are NaN or infinite, in 2 tensors: conv_first.weight, conv_last.bias" in line
    # finite in the file, not in float32
    torch.save({**state, "conv_last.bias": torch.full((3,), 1e300, dtype=torch.float64)}, tmp_path / "net.pth")
    assert "3 values are NaN or infinite" in refused(tmp_path / "net.pth")


def test_a_file_can_not_ask_for_a_network_of_any_size(tmp_path: Path, state: dict[str, Tensor]) -> None:
    for name in ("RRDB_trunk.999999999.RDB1.conv1.weight", "RRDB_trunk.9999.RDB1.conv1.weight"):
        torch.save({**state, name: torch.zeros(1)}, tmp_path / "net.pth")
        assert "unexpected: " + name in refused(tmp_path / "net.pth") or "missing" in refused(tmp_path / "net.pth")
    wide = torch.zeros(1).expand(1 << 40, 3, 3, 3)
    torch.save({**state, "conv_first.weight": wide}, tmp_path / "net.pth")
    assert "of another shape" in refused(tmp_path / "net.pth")


def test_names_are_printed_safely(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save({**state, "\x1b[2J\nroot#" + "x" * 5000: torch.zeros(1)}, tmp_path / "net.pth")
    line = refused(tmp_path / "net.pth")
    assert "\x1b" not in line
    assert r"\x1b[2J\nroot#xxx" in line


def test_other_kinds_are_recognised(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, tmp_path / "net.pth")
    assert "holds weights for --kind esrgan, not for kind masa" in refused(tmp_path / "net.pth", "masa")
    (tmp_path / "net.safetensors").write_bytes((b"\x10" + bytes(7)) + b'{"a": 1}' + bytes(20))
    assert "a safetensors file" in refused(tmp_path / "net.safetensors")


def test_read_pth_gives_the_sha256_of_the_file(tmp_path: Path) -> None:
    import hashlib

    torch.save({"a": torch.arange(3.0)}, tmp_path / "a.pth")
    foreign = read_pth(tmp_path / "a.pth")
    assert foreign.sha256 == hashlib.sha256((tmp_path / "a.pth").read_bytes()).hexdigest()
    assert torch.equal(foreign.tensors["a"], torch.arange(3.0))
