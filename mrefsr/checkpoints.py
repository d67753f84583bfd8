"""The project's own checkpoint: one safetensors file that holds everything a method needs.

Tensors are named `<part>.<name>`: `network.*`, and for the methods that match, `extractor.*` and `transfer.*`. The
header carries one JSON text with the format's version, the kind, the network's arguments, where the weights came from,
and a sha256 over all of it, names, shapes and values, because safetensors itself does not notice a changed byte. Equal
contents give equal bytes: no time, no path. Published .pth files are turned into this format by `mrefsr.foreign`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lmr_tools.schema import LmrError
from lmr_tools.tables import atomic_path
from mrefsr.config import ModelConfig
from mrefsr.features import MatchingExtractor
from mrefsr.methods.c2_matching import c2_matching
from mrefsr.methods.esrgan import RRDBNet
from mrefsr.methods.masa import MASA
from mrefsr.model import MRefSR

VERSION = 1
HEADER = "lmr_checkpoint"  # the only key: safetensors writes several in no fixed order
KINDS = ("mrefsr", "c2-matching", "masa", "esrgan")  # methods
MATCHER = "matcher"  # an extractor alone, for MRefSR's matching
STORED = (*KINDS, MATCHER)
Net = TypeVar("Net", bound=nn.Module)
SHOWN = 5  # names listed of each sort of disagreement


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Weights of one method. `parts` maps a part's name to {tensor name: float32 tensor}.

    `config` holds the network's arguments; `provenance`, JSON too, says where the weights come from, such as source
    files with their sha256, or the training run.
    """

    kind: str
    config: dict[str, Any]
    parts: dict[str, dict[str, Tensor]]
    provenance: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` to `path` atomically, as float32 on the CPU. An existing file is replaced.

    Raises OSError, with its number, when the file can not be written: a full disk, for one.
    """
    if checkpoint.kind not in STORED:
        raise ValueError(f"kind {checkpoint.kind!r} is none of {', '.join(STORED)}")
    tensors = {
        f"{part}.{name}": tensor.detach().to("cpu", torch.float32).contiguous().clone()
        for part, state in checkpoint.parts.items()
        for name, tensor in state.items()
    }
    header = {
        "version": VERSION,
        "kind": checkpoint.kind,
        "parts": sorted(checkpoint.parts),
        "config": checkpoint.config,
        "provenance": checkpoint.provenance,
    }
    text = _json(header | {"sha256": _digest(header, tensors)})
    with atomic_path(path) as temporary:
        temporary.touch()
        usual = temporary.stat().st_mode  # safetensors would keep the file from all others
        try:
            save_file(tensors, temporary, metadata={HEADER: text})
        except safetensors.SafetensorError as error:  # its writer says in words what was wrong
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
        temporary.chmod(usual)


def load_checkpoint(path: Path, *, kind: str | None = None) -> Checkpoint:
    """Read a checkpoint and verify it; with `kind`, one of another kind is refused. Anything wrong is an LmrError."""
    header, tensors = _read(path)
    version = header.get("version")
    if version != VERSION:
        raise LmrError(
            f"{path}: checkpoint format {shown(str(version))}, this version of lmr-tools reads {VERSION}; convert or "
            "train it again"
        )
    found, parts, config = header.get("kind"), header.get("parts"), header.get("config")
    provenance = header.get("provenance")
    if (
        found not in STORED
        or not isinstance(config, dict)
        or not isinstance(provenance, dict)
        or not (isinstance(parts, list) and all(isinstance(part, str) for part in parts))
        or any(tensor.dtype != torch.float32 for tensor in tensors.values())
    ):
        raise LmrError(f"{path}: damaged header; get or convert the file again")
    if kind is not None and found != kind:
        raise LmrError(f"{path}: holds weights of kind {found}, but {kind} is needed; give the file of that method")
    digest = header.pop("sha256", None)
    if digest != _digest(header, tensors):
        raise LmrError(f"{path}: damaged, its contents are not those that were written; get or convert the file again")
    states: dict[str, dict[str, Tensor]] = {part: {} for part in parts}
    for full_name, tensor in tensors.items():
        part, _, name = full_name.partition(".")
        if part not in states:
            raise LmrError(f"{path}: tensor {shown(full_name)} belongs to no part of the checkpoint")
        states[part][name] = tensor
    return Checkpoint(kind=str(found), config=config, parts=states, provenance=provenance)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise LmrError(f"{path}: no such file; give a checkpoint written by lmr convert-checkpoint or lmr train")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get(HEADER)
            if text is None:
                raise LmrError(
                    f"{path}: a safetensors file, but not a checkpoint of lmr-tools; convert the published .pth file "
                    "with lmr convert-checkpoint"
                )
            header = json.loads(text)
            if _json(header) != text:
                raise ValueError("its header is not as it was written")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError) as error:
        if file_type(path) in ("zip", "pickle"):
            raise LmrError(f"{path}: a PyTorch file; turn it into a checkpoint with lmr convert-checkpoint") from None
        raise LmrError(f"{path}: not a readable checkpoint ({shown(str(error))}); get or convert it again") from None
    if not isinstance(header, dict):
        raise LmrError(f"{path}: damaged header; get or convert the file again")
    return header, tensors


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def _digest(header: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Hex sha256 over the header and the sorted names, types, shapes and bytes of the tensors."""
    digest = hashlib.sha256(_json(header).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(_json([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_model(path: Path, model: MRefSR, provenance: dict[str, Any]) -> None:
    """Write an MRefSR model, frozen parts included, with its configuration. `provenance` is any JSON object."""
    with torch.device("meta"):
        if shapes_of(model) != shapes_of(MRefSR(model.config)):
            raise ValueError("the model is not the MRefSR network its configuration describes")
    parts = {part: dict(module.state_dict()) for part, module in model.named_children()}
    config = dataclasses.asdict(model.config)
    save_checkpoint(path, Checkpoint(kind="mrefsr", config=config, parts=parts, provenance=provenance))


def load_model(path: Path, device: torch.device | str = "cpu") -> MRefSR:
    """The MRefSR model of a checkpoint of kind `mrefsr`, published or trained here, in eval mode on `device`."""
    return _filled(path, load_checkpoint(path, kind="mrefsr"), _mrefsr, device)


def load_c2_matching(path: Path, device: torch.device | str = "cpu") -> MRefSR:
    """C2-Matching from a checkpoint of kind `c2-matching`, in eval mode on `device`."""
    return _filled(path, load_checkpoint(path, kind="c2-matching"), c2_matching, device)


def load_masa(path: Path, device: torch.device | str = "cpu") -> MASA:
    """MASA-SR's network from a checkpoint of kind `masa`, in eval mode on `device`."""
    return _filled(path, load_checkpoint(path, kind="masa"), MASA, device, part="network")


def load_esrgan(path: Path, device: torch.device | str = "cpu") -> RRDBNet:
    """ESRGAN's network from a checkpoint of kind `esrgan`, in eval mode on `device`."""
    return _filled(path, load_checkpoint(path, kind="esrgan"), RRDBNet, device, part="network")


def save_matcher(path: Path, extractor: MatchingExtractor, provenance: dict[str, Any]) -> None:
    """Write the two VGG16 copies that MRefSR matches with. `provenance` is any JSON object."""
    parts = {"extractor": dict(extractor.state_dict())}
    save_checkpoint(path, Checkpoint(kind=MATCHER, config={}, parts=parts, provenance=provenance))


def load_matcher(path: Path, device: torch.device | str = "cpu") -> MatchingExtractor:
    """The extractor of a checkpoint of kind `matcher`, trained here or converted, in eval mode on `device`."""
    return _filled(path, load_checkpoint(path, kind=MATCHER), MatchingExtractor, device, part="extractor")


def _mrefsr(**config: Any) -> MRefSR:
    return MRefSR(ModelConfig.from_dict(config))


def _filled(
    path: Path, checkpoint: Checkpoint, build: Callable[..., Net], device: torch.device | str, part: str = ""
) -> Net:
    """The module that `build` makes of the checkpoint's config, with the tensors of `part` (or of all parts)."""
    if part:
        state = checkpoint.parts.get(part, {})
    else:
        state = {
            f"{part}.{name}": value for part, of_part in checkpoint.parts.items() for name, value in of_part.items()
        }
    config = checkpoint.config
    # A block has several tensors, so more blocks than tensors can not be true, and would take forever to build.
    depth = sum(size for size in (config.get("content_blocks"), *_list(config.get("blocks"))) if isinstance(size, int))
    if depth > len(state):
        raise LmrError(f"{path}: its configuration asks for {depth} blocks, its {len(state)} tensors are fewer")
    try:
        with torch.device("meta"):
            module = build(**config)
    except (LmrError, TypeError, ValueError, RuntimeError) as error:
        raise LmrError(f"{path}: its configuration describes no network ({shown(str(error))})") from None
    if problem := disagreement(state, shapes_of(module)):
        raise LmrError(f"{path}: the weights do not fit the configuration beside them: {problem}")
    # Copies in the memory layout that the module chose (channels last or not), independent of the file.
    copies = {
        name: torch.empty_strided(blank.shape, blank.stride(), device=device).copy_(state[name])
        for name, blank in module.state_dict().items()
    }
    module.load_state_dict(copies, assign=True)
    return module.eval()


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def file_type(path: Path) -> str:
    """What a file of weights starts like: zip (torch), pickle (torch before 1.6), safetensors, or other."""
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{":  # after the header's length
        return "safetensors"
    if start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5"):  # PROTO and its number
        return "pickle"
    return "zip" if start[:4] == b"PK\x03\x04" else "other"


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """{tensor name: shape} of a module's state dict; the module may be on the meta device."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def disagreement(found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> str:
    """What is missing, unexpected or of another shape, counted and the first few named; empty when all agree."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshaped = [
        f"{name} {list(found[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name].shape) != shape
    ]
    sorts = (("missing", missing), ("unexpected", unexpected), ("of another shape", misshaped))
    return "; ".join(f"{len(names)} {sort}: {listed(names)}" for sort, names in sorts if names)


def listed(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(shown(name) for name in names[:SHOWN]) + more


def shown(text: str, limit: int = 120) -> str:
    """Text out of a file, safe for a terminal: one line, printable ASCII, cut to `limit` characters."""
    safe = text.encode("unicode_escape").decode("ascii")
    return safe if len(safe) <= limit else safe[: limit - 3] + "..."
