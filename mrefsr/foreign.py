"""Published .pth files, read without trusting them and turned into a `Checkpoint`.

A .pth file is a pickle, so it can hold code, sizes that lie, and tensors of terabytes made of one number. It is read
with `weights_only=True` alone, from a memory map where the format allows, and no tensor is touched before its name and
shape are those the network expects.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmr_tools.schema import LmrError
from lmr_tools.tables import sha256_file
from lmr_tools.weights import destination, get
from mrefsr.checkpoints import MATCHER, Checkpoint, disagreement, file_type, listed, shapes_of, shown
from mrefsr.config import ModelConfig
from mrefsr.features import LAYERS, MatchingExtractor, VGGFeatures
from mrefsr.methods import esrgan
from mrefsr.methods.c2_matching import c2_matching
from mrefsr.methods.masa import MASA
from mrefsr.network import RestorationNet

MAX_BYTES = 4 << 30  # the largest file asked for here, VGG19 with its classifier, has 0.55 GB
ENTRIES = ("params_ema", "params")  # BasicSR's wrappers; the averaged weights are the better ones
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_PLAIN = "save it again as plain tensors: torch.save(network.state_dict(), FILE)"


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """A foreign file's tensors, not yet copied out of it. `entry` says where in the file they were: flat, params."""

    path: Path
    sha256: str
    entry: str
    tensors: dict[str, Tensor]


def read_pth(path: Path) -> Foreign:
    """Read a .pth file's dict of tensors; `params_ema` goes before `params`, a `module.` before every name is dropped.

    Anything else than floating-point tensors under text names is an LmrError. Shapes and values are not judged here.
    """
    packed = _guarded(path)
    digest = sha256_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sparse tensors and the like, which are refused below
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=packed)
    except MemoryError:
        raise LmrError(f"{path}: asks for more memory than there is; {_PLAIN}") from None
    except Exception as error:  # the parser of a hostile file may fail in any way; each must end as one line
        message = str(error)
        if code := re.search(r"GLOBAL ([\w.]+)", message):
            raise LmrError(f"{path}: refused, it holds code or objects ({shown(code[1], 60)}); {_PLAIN}") from None
        reason = shown(message.strip().split("\n")[0]) or type(error).__name__
        raise LmrError(f"{path}: not a readable PyTorch file ({reason}); download it again") from None
    entry, state = _state(path, content)
    while state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
        entry += ", module."
    return Foreign(path=path, sha256=digest, entry=entry, tensors=state)


def _guarded(path: Path) -> bool:
    """Refuse what is no checkpoint or unpacks to more than it is; whether the file is a zip (torch >= 1.6) archive."""
    if not path.is_file():
        raise LmrError(f"{path}: no such file; give a downloaded .pth file")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise LmrError(f"{path}: {size / 2**30:.1f} GB, no checkpoint read here is so large; give the network's file")
    looks = file_type(path)
    if looks == "pickle":  # as torch wrote it before 1.6
        return False
    if looks == "safetensors":
        raise LmrError(f"{path}: a safetensors file, not a PyTorch one; it may be converted already")
    if looks != "zip":
        raise LmrError(f"{path}: not a PyTorch file; download it again")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise LmrError(f"{path}: damaged or cut off ({shown(str(error))}); download it again") from None
    # torch.save stores and never compresses, so the parts of an honest file fit into it.
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise LmrError(f"{path}: refused, it is compressed inside and could unpack to any size; {_PLAIN}")
    if sum(member.file_size for member in members) > size:
        raise LmrError(f"{path}: refused, its parts claim more bytes than the file has; {_PLAIN}")
    return True


def _state(path: Path, content: Any) -> tuple[str, dict[str, Tensor]]:
    """The dict of tensors inside what was loaded, and the name of the entry it was under."""
    entry = "flat"
    if isinstance(content, dict):
        wrapped = [name for name in ENTRIES if isinstance(content.get(name), dict)]
        if wrapped:
            entry, content = wrapped[0], content[wrapped[0]]
            if len(wrapped) > 1:
                entry += " (params is there too)"
    if not isinstance(content, dict) or not content:
        raise LmrError(f"{path}: holds no dict of tensors, but {shown(type(content).__name__)}; {_PLAIN}")
    wrong = [str(name) for name, value in content.items() if not (isinstance(name, str) and _is_plain(value))]
    if wrong:
        raise LmrError(f"{path}: {len(wrong)} entries are no floating-point tensors: {listed(wrong)}; {_PLAIN}")
    return entry, dict(content)


def _is_plain(value: Any) -> bool:
    """A dense floating-point tensor on the CPU, not a subclass, sparse, quantised, or a shape without values."""
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.dtype in FLOATS
    )


def take(foreign: Foreign, names: Mapping[str, str], expected: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors under the names of this project, as float32 copies in the order of `expected` {name: shape}.

    `names` maps the file's names to the names here; every disagreement is listed in one LmrError, nothing is skipped.
    """
    path = foreign.path
    if twice := sorted(name for name, count in Counter(names.values()).items() if count > 1):
        raise LmrError(f"{path}: {len(twice)} tensors are there under two names: {listed(twice)}; give another file")
    state = {own: foreign.tensors[name] for name, own in names.items()}
    if problem := disagreement(state, expected):
        raise LmrError(f"{path}: does not fit the {len(expected)} tensors expected: {problem}")
    # Shapes are right from here on, so what is copied is no larger than the network itself.
    hollow = [name for name, value in state.items() if value.nbytes > value.untyped_storage().nbytes()]
    if hollow:
        raise LmrError(f"{path}: refused, {len(hollow)} tensors claim more values than they have: {listed(hollow)}")
    taken = {name: state[name].detach().to(torch.float32, copy=True).contiguous() for name in expected}
    broken = {name: count for name, value in taken.items() if (count := value.numel() - int(value.isfinite().sum()))}
    if broken:
        raise LmrError(
            f"{path}: {sum(broken.values())} values are NaN or infinite, in {len(broken)} tensors: "
            f"{listed(list(broken))}; get the file again"
        )
    return taken


class Layout(NamedTuple):
    """How a file's tensors map onto a network: {file's name: name here}, arguments, {name here: shape}."""

    naming: str
    names: dict[str, str]
    config: dict[str, Any]
    expected: dict[str, tuple[int, ...]]


def _esrgan(tensors: Mapping[str, Tensor]) -> Layout:
    naming, names = esrgan.rename(tensors)
    config = esrgan.config_of({own: tensors[name].shape for name, own in names.items()})
    return Layout(naming, names, config, _shapes(lambda: esrgan.RRDBNet(**config)))


def _masa(tensors: Mapping[str, Tensor]) -> Layout:
    return Layout("published", _same(tensors), {"nf": 64}, _shapes(MASA))


def _c2_matching(tensors: Mapping[str, Tensor]) -> Layout:
    return Layout("published", _same(tensors), {}, _shapes(lambda: c2_matching().network))


def _mrefsr(tensors: Mapping[str, Tensor]) -> Layout:
    config = ModelConfig()
    return Layout("published", _same(tensors), dataclasses.asdict(config), _shapes(lambda: RestorationNet(config)))


def _extractor(tensors: Mapping[str, Tensor]) -> Layout:
    return Layout("published", _same(tensors), {}, _shapes(MatchingExtractor))


def _vgg19(tensors: Mapping[str, Tensor]) -> Layout:
    """VGG19 up to conv3_1, out of torchvision's whole network or of a published correspondence network."""
    if any(name.startswith("vgg.vgg_net.") for name in tensors):
        naming, prefix = "published", re.compile(r"vgg\.vgg_net\.conv\d_\d\.|vgg\.(mean|std)$")
        names = {f"vgg.vgg_net.{layer}": f"model.{layer}" for layer in LAYERS} | {"vgg.mean": "mean", "vgg.std": "std"}
    else:
        naming, prefix = "torchvision", re.compile(r"(features|classifier)\.\d+\.")
        names = {f"features.{place}": f"model.{layer}" for layer, (place, _, _) in LAYERS.items()}
    own = {f"{name}.{kind}": f"{to}.{kind}" for name, to in names.items() for kind in ("weight", "bias")} | names
    # What lies above relu3_1 is not needed; what belongs to no VGG at all stays under its own name, as unexpected.
    kept = {name: own.get(name, name) for name in tensors if name in own or not prefix.match(name)}
    expected = _shapes(VGGFeatures)
    if naming == "torchvision":
        expected = {name: shape for name, shape in expected.items() if name not in ("mean", "std")}
    return Layout(naming, kept, {}, expected)


def _shapes(build: Callable[[], torch.nn.Module]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return shapes_of(build())


def _same(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: name for name in tensors}


NETWORKS: dict[str, Callable[[Mapping[str, Tensor]], Layout]] = {
    "mrefsr": _mrefsr,
    "c2-matching": _c2_matching,
    "masa": _masa,
    "esrgan": _esrgan,
    "matcher": _extractor,
}
MATCHING = ("mrefsr", "c2-matching")  # the kinds that also need an extractor and VGG19


def convert(kind: str, net: Path, *, extractor: Path | None = None, vgg19: Path | None = None) -> Checkpoint:
    """A checkpoint of `kind` from published files; its provenance names each file, its sha256 and what was found in it.

    The kinds that match need C2-Matching's contrastive extractor, and VGG19, which is taken from torchvision's cache
    when it lies there. LmrError when a file is missing, hostile, or not what it should be.
    """
    if kind not in MATCHING and (extractor or vgg19):
        raise LmrError(f"--extractor and --vgg19: kind {kind} uses neither; leave them out")
    if kind in MATCHING:
        vgg19 = vgg19 or destination(get("vgg19"))
        if missing := _missing(extractor, vgg19):
            raise LmrError(f"kind {kind} needs more files: {'; '.join(missing)}")
    first = "extractor" if kind == MATCHER else "network"
    files = [(first, net, NETWORKS[kind])]
    if extractor and vgg19:
        files += [("extractor", extractor, _extractor), ("transfer", vgg19, _vgg19)]
    parts, sources, config = {}, [], {}
    for part, path, layout_of in files:
        foreign = read_pth(path)
        layout = layout_of(foreign.tensors)
        _refuse_other(foreign, part, kind, layout)
        parts[part] = take(foreign, layout.names, layout.expected)
        if part == "network":
            config = layout.config
        if layout_of is _vgg19:
            parts[part] = {name: parts[part].get(name, value) for name, value in VGGFeatures().state_dict().items()}
        sources.append(
            {
                "part": part,
                "file": path.name,
                "sha256": foreign.sha256,
                "entry": foreign.entry,
                "naming": layout.naming,
                "tensors": len(parts[part]),
                "parameters": sum(value.numel() for value in parts[part].values()),
            }
        )
    provenance = {"converted_by": _version(), "sources": sources}
    return Checkpoint(kind=kind, config=config, parts=parts, provenance=provenance)


def _missing(extractor: Path | None, vgg19: Path) -> list[str]:
    """Which of the files beside the network are not there, and where they come from."""
    missing = []
    if extractor is None:
        missing.append(
            "--extractor, C2-Matching's contrastive extractor feature_extraction.pth, one of the pretrained models "
            "linked in the README of yumingj/C2-Matching"
        )
    if vgg19 == destination(get("vgg19")) and not vgg19.is_file():
        missing.append(f"--vgg19, torchvision's ImageNet weights {vgg19.name}, found by itself when at {vgg19}")
    return missing


def _refuse_other(foreign: Foreign, part: str, kind: str, layout: Layout) -> None:
    """Say what a file is when it is whole, but not what was asked for."""
    tensors, path = foreign.tensors, foreign.path
    if part == "transfer" and "features.17.weight" in tensors and "features.16.weight" not in tensors:
        raise LmrError(f"{path}: this is VGG16, --vgg19 needs torchvision's VGG19, {get('vgg19').file}")
    if set(layout.expected) <= set(layout.names.values()):
        return
    for other, layout_of in (("--extractor", _extractor), ("--vgg19", _vgg19), *NETWORKS.items()):
        found = layout_of(tensors)
        if set(found.expected) <= set(found.names.values()):
            wanted = f"kind {kind}" if part == "network" or kind == MATCHER else f"the {part}"
            here = other if other.startswith("--") else f"--kind {other}"
            raise LmrError(f"{path}: holds weights for {here}, not for {wanted}; give the right file")


def _version() -> str:
    try:
        return f"lmr-tools {importlib.metadata.version('lmr-tools')}"
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "lmr-tools"
