"""A finished dataset at a URL: the manifest is taken away first and put last, every file's size is checked, and a file
that is there only in part is put again. Imports `dataset`, whose files it knows, and `stores`, which repeats calls.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from dataclasses import dataclass
from pathlib import Path

from lmr_tools.dataset import MANIFEST, read_manifest, work_folder
from lmr_tools.schema import LmrError
from lmr_tools.stores import Store
from lmr_tools.tables import read_json, sha256_file, write_json

CLAIM = ".lmr-writing"


@dataclass(frozen=True, kw_only=True)
class Published:
    """What an upload did: files put, files that were there already, calls made again."""

    uploaded: int
    kept: int
    retried: int


def publish(dataset: Path, store: Store) -> Published:
    """Put a finished dataset at the store's URL; an interrupted upload goes on, and other files there stay.

    LmrError when another build writes there.
    """
    read_manifest(dataset)
    names = [p.relative_to(dataset).as_posix() for p in sorted(dataset.rglob("*")) if p.is_file()]
    names = [n for n in names if n != MANIFEST and not n.startswith("work/") and not Path(n).name.startswith(".")]
    receipts = work_folder(dataset) / f"published-{hashlib.sha256(store.url.encode()).hexdigest()[:12]}.json"
    done: dict[str, str] = read_json(receipts) if receipts.is_file() else {}
    done.setdefault("claim", uuid.uuid4().hex)
    write_json(receipts, done)
    _claim(store, done["claim"])
    uploaded = 0
    # From here on what lies there is not whole.
    store.remove(MANIFEST)
    for name in [*names, MANIFEST]:
        source = dataset / name
        digest = sha256_file(source)
        if name != MANIFEST and done.get(name) == digest and store.size(name) == source.stat().st_size:
            continue
        store.put(source, name)
        uploaded += 1
        done[name] = digest
        write_json(receipts, done)
    stale = [n for n in done if n != "claim" and n not in names and n != MANIFEST]
    for name in stale:  # shards of an earlier build that this one has not
        store.remove(name)
        del done[name]
    write_json(receipts, done)
    store.remove(CLAIM)
    return Published(uploaded=uploaded, kept=len(names) + 1 - uploaded, retried=store.retried)


def _claim(store: Store, owner: str) -> None:
    """Mark the place as being written by `owner`, who may come again after a stop."""
    mark = json.dumps({"owner": owner}).encode()

    def take() -> None:
        protocol = store.files.protocol
        store.files.makedirs(store.base, exist_ok=True)
        if "s3" in protocol:  # the store itself refuses the second writer
            store.files.pipe_file(store.path(CLAIM), mark, mode="create")
        elif store.files.exists(store.path(CLAIM)):
            raise FileExistsError(CLAIM)
        else:
            store.files.pipe_file(store.path(CLAIM), mark)

    def read() -> bytes:
        store.files.invalidate_cache()
        return bytes(store.files.cat_file(store.path(CLAIM)))

    try:
        store.call(CLAIM, take)
    except FileExistsError:
        if store.call(CLAIM, read) != mark:
            raise LmrError(
                f"{store.shown}: another build is writing there; wait for it, or delete {CLAIM} there if it is dead"
            ) from None
    except PermissionError:
        raise LmrError(f"{store.shown}: no permission to write there") from None
