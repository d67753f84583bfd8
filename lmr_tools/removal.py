"""Photos that must stay out: a list of ids, paths or hashes becomes entries that outlive the files.

An entry is the photo's sha256 and its perceptual hash, so that the photo stays out when it comes back under another
name, and its re-encoded or resized copies too. Entries stand in dataset.json and in `removed.json` beside it, which is
written before anything else changes. Imports `dataset`, `hash_search` and
`rebuild`, which reads published tables, and `dedup`'s rejects.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lmr_tools.dataset import MANIFEST
from lmr_tools.dedup import reject
from lmr_tools.hash_search import close_hashes
from lmr_tools.rebuild import Published
from lmr_tools.schema import ImageRow, LmrError, RejectRow
from lmr_tools.tables import read_json, rows_of, write_json

STAGE = "removal"
NEAR_BITS = 12  # where a dataset's recipe does not say how far copies may differ
FILE = "removed.json"
SHA256 = re.compile(r"[0-9a-f]{64}")
PHASH = re.compile(r"[0-9a-f]{64}")
MAX_LIST_BYTES = 100 * 2**20


@dataclass(frozen=True, kw_only=True)
class Removed:
    """One photo that must stay out. `phash` and `path` are null when no dataset ever held the photo."""

    sha256: str
    phash: str | None = None
    path: str | None = None


def read_list(path: Path) -> list[tuple[int, str]]:
    """(line number, entry) of a removal list: one id, path or sha256 a line; empty lines and `# ...` are skipped."""
    try:
        if path.stat().st_size > MAX_LIST_BYTES:
            raise LmrError(
                f"{path}: larger than {MAX_LIST_BYTES} bytes; a removal list has one id, path or hash a line"
            )
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise LmrError(f"{path}: no such removal list") from None
    except (OSError, UnicodeDecodeError) as error:
        raise LmrError(f"{path}: not a readable removal list ({error})") from None
    lines = ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1))
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def resolve(
    entries: Iterable[tuple[int, str]],
    rows: Iterable[ImageRow],
    roots: Sequence[str],
    known: Sequence[Removed],
    name: str,
) -> tuple[Removed, ...]:
    """`known` and what the entries of the list `name` mean among `rows`, whose sources have these `roots`.

    A sha256 that no row has is taken as it is. An id or path that names nothing, or several photos, is an LmrError:
    a request to remove must not be lost by a slip of the pen.
    """
    by_name: dict[str, dict[str, Removed]] = {}
    for row in rows:
        if not row.sha256:
            continue
        entry = Removed(sha256=row.sha256, phash=row.phash or None, path=row.path)
        whole = f"{roots[row.source].rstrip('/')}/{row.path}" if row.source < len(roots) else row.path
        for name_of_it in {row.image_id, row.sha256, row.path, whole}:
            by_name.setdefault(name_of_it, {}).setdefault(row.sha256, entry)
    for entry in known:
        for old_name in (entry.sha256, entry.sha256[:16], entry.path):
            if old_name:
                by_name.setdefault(old_name, {}).setdefault(entry.sha256, entry)
    found = {entry.sha256: entry for entry in known}
    for line, text in entries:
        meant = by_name.get(text) or by_name.get(text.lower()) or {}
        if not meant and SHA256.fullmatch(text.lower()):
            meant = {text.lower(): Removed(sha256=text.lower())}
        if not meant:
            raise LmrError(
                f"{name}: line {line}: no photo has the id, path or sha256 {text[:200]!r}; paths are those of "
                "tables/images.parquet"
            )
        if len(meant) > 1:
            raise LmrError(
                f"{name}: line {line}: {text[:200]!r} names {len(meant)} photos; give ids: "
                f"{', '.join(sha256[:16] for sha256 in sorted(meant))}"
            )
        for sha256, entry in meant.items():
            found[sha256] = entry if found.get(sha256, entry).phash is None else found.get(sha256, entry)
    return tuple(found[sha256] for sha256 in sorted(found))


def recorded(dataset: Path) -> tuple[Removed, ...]:
    """The entries that `dataset` holds: those of its manifest, if it has one, and of removed.json."""
    found: dict[str, Removed] = {}
    for path in (dataset / MANIFEST, dataset / FILE):
        if path.is_file():
            content = read_json(path)
            for entry in parse(content.get("removed", []) if isinstance(content, dict) else content, str(path)):
                found[entry.sha256] = entry
    return tuple(found[sha256] for sha256 in sorted(found))


def parse(values: Any, name: str) -> list[Removed]:
    """Entries from JSON. LmrError when they are not what `as_json` makes: then nothing may be built on them."""
    if not isinstance(values, list):
        raise LmrError(f"{name}: its list of removed photos is damaged")
    entries = []
    for value in values:
        fields: Mapping[str, Any] = value if isinstance(value, dict) else {}
        sha256, phash, path = fields.get("sha256"), fields.get("phash"), fields.get("path")
        if not isinstance(sha256, str) or not SHA256.fullmatch(sha256):
            raise LmrError(f"{name}: its list of removed photos is damaged (entry {str(value)[:80]})")
        if not (phash is None or (isinstance(phash, str) and PHASH.fullmatch(phash))):
            raise LmrError(f"{name}: its list of removed photos is damaged (phash of {sha256[:16]})")
        entries.append(Removed(sha256=sha256, phash=phash, path=path if isinstance(path, str) else None))
    return entries


def as_json(removed: Sequence[Removed]) -> list[dict[str, str | None]]:
    """The entries as they stand in dataset.json."""
    return [asdict(entry) for entry in removed]


def renew(dataset: Path, listed: Path | None, rows: Iterable[ImageRow], roots: Sequence[str]) -> tuple[Removed, ...]:
    """What `dataset` records and what the list `listed` adds to it; recorded before anything else changes."""
    known = recorded(dataset)
    removed = resolve(read_list(listed), rows, roots, known, str(listed)) if listed else known
    record(dataset, removed)
    return removed


def gather(parts: Iterable[Published], listed: Path | None) -> tuple[Removed, ...]:
    """What several published datasets record, and what the list `listed` means among all their photos."""
    known: dict[str, Removed] = {}
    rows: list[ImageRow] = []
    roots: list[str] = []
    for part in parts:
        known |= {entry.sha256: entry for entry in recorded(part.folder)}
        own = rows_of(part.tables["images"], ImageRow)
        rows += [replace(row, source=row.source + len(roots)) for row in own]
        roots += part.manifest["sources"]
    return resolve(read_list(listed) if listed else [], rows, roots, list(known.values()), str(listed))


def record(dataset: Path, removed: Sequence[Removed]) -> None:
    """Write `removed.json`, so that the list survives a run that is killed before its manifest is written."""
    if removed:
        write_json(dataset / FILE, as_json(removed))


def removed_photos(rows: Sequence[ImageRow], removed: Sequence[Removed], *, max_bits: int) -> list[RejectRow]:
    """The rejects among `rows`: the removed photos, and photos whose hash is within `max_bits` of one of them."""
    by_hash = {entry.sha256: entry for entry in removed}
    gone = {
        row.image_id: reject(row, STAGE, "removed on request", f"sha256 {row.sha256}")
        for row in rows
        if row.sha256 in by_hash
    }
    others = [row for row in rows if row.image_id not in gone and row.phash]
    hashed = [entry for entry in removed if entry.phash]
    near = close_hashes([row.phash for row in others], [entry.phash or "" for entry in hashed], max_bits)
    for number, entry, bits in near:
        row = others[number]
        if row.image_id not in gone:
            detail = f"of {hashed[entry].sha256[:16]}: {bits} of 256 bits"
            gone[row.image_id] = reject(row, STAGE, "copy of a removed photo", detail)
    return [gone[row.image_id] for row in rows if row.image_id in gone]


def newly_removed(
    rows: Sequence[ImageRow], rejects: Iterable[RejectRow], removed: Sequence[Removed], recipe: Mapping[str, Any]
) -> dict[str, RejectRow]:
    """`removed_photos` among the rows of a built dataset, by image id, unless its rejects say so already.

    Photos that were rejected for another reason are taken as well, so that the tables say why they stay out.
    """
    bits = recipe.get("near_hash_bits")
    gone = removed_photos(rows, removed, max_bits=bits if isinstance(bits, int) else NEAR_BITS)
    before = {row.image_id for row in rejects if row.stage == STAGE}
    return {row.image_id: row for row in gone if row.image_id not in before}
