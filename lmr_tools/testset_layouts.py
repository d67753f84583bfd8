"""The folders of benchmarks and of one's own pictures: which target has which references, by the names of the files.

No picture is opened. Files are paired by name, never by position: one that is missing is named, and nothing shifts.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmr_tools import images
from lmr_tools.schema import LmrError, ShardRow

CUFED_NAME = re.compile(r"(\d+)_([0-5])")
TIER_NAME = re.compile(r"([HML])\d*")
TIER_ORDER = {"H": 0, "M": 1, "L": 2, "": 3}
SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class ReferenceEntry:
    """One reference: a file, a slot of a group in a shard, or with neither the target's own LR."""

    name: str
    path: Path | None = None
    slot: str = ""
    tier: str = ""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One target and its references, most similar first where that is known. In a dataset, `target` is a shard."""

    image_id: str
    target: Path
    references: tuple[ReferenceEntry, ...]
    shard: ShardRow | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All targets of a test set, and the files in its folder that belong to none of them."""

    entries: tuple[Entry, ...]
    ignored: tuple[str, ...] = ()


def _pictures(folder: Path) -> dict[str, Path]:
    """{stem: path} of the pictures in a folder, sorted by name. LmrError when one stem is there with two endings."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in images.SUFFIXES and path.is_file() and not path.name.startswith("."):
            if path.stem in found:
                raise LmrError(f"{folder}: holds {found[path.stem].name} and {path.name}; keep one of them")
            found[path.stem] = path
    return found


def _others(folder: Path, used: Iterable[Path]) -> tuple[str, ...]:
    taken = {path.name for path in used}
    return tuple(sorted(path.name for path in folder.iterdir() if path.name not in taken and path.name[0] != "."))


def _wrong(folder: Path, expected: str) -> LmrError:
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if path.name[0] != ".")
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    found = ", ".join(names[:SHOWN]) + more if names else "an empty folder"
    return LmrError(f"{folder}: expected {expected}; found {found}")


def _cufed5(data: Path) -> Plan:
    pictures = _pictures(data)
    groups = sorted({match[1] for stem in pictures if (match := CUFED_NAME.fullmatch(stem))})
    if not groups:
        raise _wrong(data, "NNN_0.png (targets) and NNN_1.png to NNN_5.png (references)")
    entries = []
    for group in groups:
        missing = [f"{group}_{number}.png" for number in range(6) if f"{group}_{number}" not in pictures]
        if missing:
            raise LmrError(f"{data / missing[0]}: is missing; a CUFED5 group is {group}_0.png to {group}_5.png")
        target, *references = (pictures[f"{group}_{number}"] for number in range(6))
        entries.append(_entry(group, target, references))
    return Plan(entries=tuple(entries), ignored=_others(data, _files(entries)))


def _lmr(data: Path) -> Plan:
    expected = "one folder SCENE_TARGETFILE a group (such as 0000_1234.jpg), with TARGETFILE and its references in it"
    folders = sorted(path for path in data.iterdir() if path.is_dir() and path.name[0] != ".")
    if not folders:
        raise _wrong(data, expected)
    entries = []
    for folder in folders:
        target = folder / folder.name[5:]
        if folder.name[4:5] != "_" or target.suffix.lower() not in images.SUFFIXES:
            raise _wrong(data, expected)
        if not target.is_file():
            raise LmrError(f"{target}: is missing; the folder is named after the target that it holds")
        references = [path for path in _pictures(folder).values() if path != target]
        if not references:
            raise LmrError(f"{folder}: holds the target alone, no reference")
        entries.append(_entry(folder.name, target, references))
    return Plan(entries=tuple(entries), ignored=_others(data, folders))


def _wr_sr(data: Path) -> Plan:
    inputs, refs = data / "input", data / "ref"
    if not inputs.is_dir() or not refs.is_dir():
        raise _wrong(data, "input/NNN.png and ref/NNN_ref.png")
    entries, references = [], _pictures(refs)
    for stem, target in _pictures(inputs).items():
        if f"{stem}_ref" not in references:
            raise LmrError(f"{refs / f'{stem}_ref{target.suffix}'}: is missing; it is the reference of {target.name}")
        entries.append(_entry(stem, target, [references[f"{stem}_ref"]]))
    if not entries:
        raise _wrong(inputs, "NNN.png")
    ignored = [name for folder in (inputs, refs) for name in _others(folder, _files(entries))]
    return Plan(entries=tuple(entries), ignored=(*_others(data, (inputs, refs)), *ignored))


def _sun80(data: Path) -> Plan:
    targets, matches = data / "Sun_Hays_SR_groundtruth", data / "Sun_Hays_SR_scenematches"
    if not targets.is_dir() or not matches.is_dir():
        raise _wrong(data, f"{targets.name}/NAME.jpg and {matches.name}/NAME.jpg/ with 20 references")
    entries = []
    for stem, target in _pictures(targets).items():
        folder = matches / target.name
        if not folder.is_dir() or not _pictures(folder):
            raise LmrError(f"{folder}: is missing or holds no picture; it is the folder of {target.name}'s references")
        entries.append(_entry(stem, target, list(_pictures(folder).values())))
    return Plan(entries=tuple(entries), ignored=_others(targets, _files(entries)))


def _urban100(data: Path) -> Plan:
    """The LR itself is the reference. Where files are named ..._HR.png, only these are targets."""
    pictures = _pictures(data)
    targets = {stem: path for stem, path in pictures.items() if stem.endswith("_HR")} or pictures
    if not targets:
        raise _wrong(data, "img_001.png ..., or img_001_SRF_4_HR.png ...")
    own = (ReferenceEntry(name="lr"),)
    entries = [Entry(image_id=stem, target=path, references=own) for stem, path in targets.items()]
    return Plan(entries=tuple(entries), ignored=_others(data, _files(entries)))


def _manga109(data: Path) -> Plan:
    """A page's reference is another page of the same folder: the published choice was random, here it is fixed.

    It depends on the names alone, and the result row names it.
    """
    pages = list(_pictures(data).values())
    if len(pages) < 2:
        raise _wrong(data, "two pages or more, as PNG or JPEG")
    entries = []
    for number, page in enumerate(pages):
        draw = int.from_bytes(hashlib.sha256(page.stem.encode()).digest()[:8], "big")
        other = pages[(number + 1 + draw % (len(pages) - 1)) % len(pages)]
        entries.append(_entry(page.stem, page, [other]))
    return Plan(entries=tuple(entries), ignored=_others(data, pages))


def _folder(data: Path) -> Plan:
    """One's own: a folder a target, with `target.png` and references in it; or pictures without references."""
    folders = sorted(path for path in data.iterdir() if path.is_dir() and path.name[0] != ".")
    flat = _pictures(data)
    if not folders and flat:
        entries = [_entry(stem, path, []) for stem, path in flat.items()]
        return Plan(entries=tuple(entries), ignored=_others(data, flat.values()))
    if not folders:
        raise _wrong(data, "a folder a target, with target.png and its references; or pictures without references")
    entries = []
    for folder in folders:
        pictures = _pictures(folder)
        if "target" not in pictures:
            raise _wrong(folder, "target.png and references (H.png, M1.png ... carry their tier in the name)")
        entries.append(_entry(folder.name, pictures.pop("target"), list(pictures.values()), tiers=True))
    return Plan(entries=tuple(entries), ignored=_others(data, folders))


def _entry(image_id: str, target: Path, references: Sequence[Path], tiers: bool = False) -> Entry:
    def reference(path: Path) -> ReferenceEntry:
        match = TIER_NAME.fullmatch(path.stem) if tiers else None
        return ReferenceEntry(name=path.name, path=path, tier=match[1] if match else "")

    made = [reference(path) for path in references]
    if tiers:
        made.sort(key=lambda entry: (TIER_ORDER[entry.tier], entry.name))
    return Entry(image_id=image_id, target=target, references=tuple(made))


def _files(entries: Iterable[Entry]) -> list[Path]:
    return [path for entry in entries for path in (entry.target, *(r.path for r in entry.references)) if path]


LAYOUTS: Mapping[str, Callable[[Path], Plan]] = {
    "cufed5": _cufed5,
    "lmr": _lmr,
    "wr-sr": _wr_sr,
    "sun80": _sun80,
    "urban100": _urban100,
    "manga109": _manga109,
    "folder": _folder,
}
