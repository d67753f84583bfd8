"""A `Group` as the members of one sample, and back: PNG crops, and a JSON that says everything but the pixels.

What is unpacked may come from anywhere: JSON, PNG headers and pixels are judged against each other, and a PNG's header
before any pixel is decoded.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
import struct
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image as PilImage

from lmr_tools.images import MAX_PIXELS, encode_png
from lmr_tools.schema import Group, LmrError, Reference, Split, Tier

if TYPE_CHECKING:
    from lmr_tools.schema import Image

GROUP_ID = re.compile(r"[A-Za-z0-9_-]{1,80}")
PNG_HEADER = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"

Value = TypeVar("Value", str, int, float, dict[str, Any], list[Any])


def pack(group: Group) -> dict[str, str | bytes]:
    """The sample of `group` as `webdataset.TarWriter` takes it. Raises `LmrError` for an id that can be no key."""
    if not GROUP_ID.fullmatch(group.group_id):
        raise LmrError(f"group id {group.group_id!r} can not be a shard key: use 1-80 of A-Z a-z 0-9 _ -")
    if len(group.references) > 100:
        raise LmrError(f"group {group.group_id}: {len(group.references)} references, a sample holds at most 100")
    sample: dict[str, str | bytes] = {"__key__": group.group_id, "target.png": encode_png(group.target)}
    for number, reference in enumerate(group.references):
        sample[f"ref{number}.png"] = encode_png(reference.pixels)
    sample["json"] = json.dumps(describe(group), separators=(",", ":"), allow_nan=False).encode()
    return sample


def describe(group: Group) -> dict[str, Any]:
    """What a sample's JSON says of `group`: everything but the pixels. Boxes are in source pixels."""

    def box(x: int, y: int, pixels: Image) -> dict[str, int]:
        return {"x": int(x), "y": int(y), "width": pixels.shape[1], "height": pixels.shape[0]}

    references = []
    for reference in group.references:
        fields = {field.name: getattr(reference, field.name) for field in dataclasses.fields(reference)}
        x, y, pixels = fields.pop("x"), fields.pop("y"), fields.pop("pixels")
        references.append(fields | box(x, y, pixels))
    target = {"image_id": group.target_image, "path": group.target_path}
    return {
        "format": "lmr-group",
        "version": 1,
        "group_id": group.group_id,
        "split": str(group.split),
        "scene": group.scene,
        "target": target | box(group.target_x, group.target_y, group.target),
        "references": references,
    }


def group_of(key: str, members: Mapping[str, bytes], *, decode: bool | Collection[str] = True) -> Group:
    """The `Group` of one sample. Raises `LmrError` naming the sample when members, JSON and pixels do not agree.

    Without `decode` the PNG data stay packed (only their headers are judged) and the pixels are black; a collection
    names the members that are decoded.
    """
    try:
        return _group_of(key, members, decode)
    except LmrError as error:
        raise LmrError(f"sample {key}: {error}") from None


def _group_of(key: str, members: Mapping[str, bytes], decode: bool | Collection[str]) -> Group:
    if "json" not in members:
        raise LmrError("no json member")
    try:
        meta = json.loads(members["json"])
    except (ValueError, RecursionError):
        raise LmrError("its json can not be parsed") from None
    if not isinstance(meta, dict) or meta.get("format") != "lmr-group" or meta.get("version") != 1:
        raise LmrError("its json is not of format lmr-group, version 1")
    if _take(meta, "group_id", str) != key:
        raise LmrError(f"its json names group {meta['group_id']!r}")
    references = _take(meta, "references", list)
    wanted = {"json", "target.png", *(f"ref{number}.png" for number in range(len(references)))}
    if members.keys() != wanted:
        raise LmrError(f"{sorted(members.keys() ^ wanted)[0]} is missing or too much: {len(references)} references")
    target = _take(meta, "target", dict)
    return Group(
        group_id=key,
        scene=_take(meta, "scene", str),
        split=_choice(Split, _take(meta, "split", str)),
        target=_crop(members["target.png"], target, "target.png", decode),
        target_image=_take(target, "image_id", str),
        target_path=_take(target, "path", str),
        target_x=_take(target, "x", int),
        target_y=_take(target, "y", int),
        references=tuple(
            _reference(fields, members[f"ref{number}.png"], f"ref{number}.png", decode)
            for number, fields in enumerate(references)
        ),
    )


def _reference(fields: Any, data: bytes, member: str, decode: bool | Collection[str]) -> Reference:
    if not isinstance(fields, dict):
        raise LmrError(f"the json entry of {member} is not an object")
    return Reference(
        pixels=_crop(data, fields, member, decode),
        image_id=_take(fields, "image_id", str),
        path=_take(fields, "path", str),
        slot=_take(fields, "slot", str),
        tier=_choice(Tier, _take(fields, "tier", str)),
        overlap=_number(fields, "overlap"),
        scale_ratio=_number(fields, "scale_ratio"),
        clip_score=_number(fields, "clip_score"),
        x=_take(fields, "x", int),
        y=_take(fields, "y", int),
    )


def _take(fields: dict[str, Any], name: str, kind: type[Value]) -> Value:
    value = fields.get(name)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or value != value:
        raise LmrError(f"its json has no proper {name!r}")
    return value


def _number(fields: dict[str, Any], name: str) -> float | None:
    return None if fields.get(name) is None else _take(fields, name, float)


def _choice(kind: Any, text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise LmrError(f"its json has {text!r} where one of {', '.join(kind)} stands") from None


def _crop(data: bytes, fields: dict[str, Any], member: str, decode: bool | Collection[str]) -> Image:
    """Decode one PNG; the header is judged against the JSON before any pixel is unpacked."""
    size = (_take(fields, "width", int), _take(fields, "height", int))
    if len(data) < 33 or not data.startswith(PNG_HEADER):
        raise LmrError(f"{member} is not a PNG")
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    if (width, height) != size:
        raise LmrError(f"{member} is {width}x{height}, its json says {size[0]}x{size[1]}")
    if (depth, colour) != (8, 2) or not 0 < width * height <= MAX_PIXELS // 4:
        raise LmrError(f"{member} is not an 8-bit RGB crop of sane size")
    if not (decode if isinstance(decode, bool) else member in decode):
        return np.broadcast_to(np.zeros(3, np.uint8), (height, width, 3))
    try:
        with PilImage.open(io.BytesIO(data), formats=("PNG",)) as picture:
            return np.array(picture)
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error) as error:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise LmrError(f"{member} does not decode ({text[:120]})") from None
