"""A copy of the work files at a URL: fetched before a build, put there while it runs and at its end, so that a build
goes on on another machine when its own is taken away. Imports `stores`, which repeats calls.

Work files carry their content or settings in their names, so a file that is here is never replaced by one from there.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lmr_tools.schema import LmrError
from lmr_tools.stores import Store

THREADS = 16  # small files: a call is mostly waiting
EVERY = 60.0  # seconds between looks at what is new, and at least ten times what the last one took
# Indices are learnt anew (a foreign one could crash its reader); receipts belong to files that are not copied.
NOT_COPIED = ("index-", "published-", "shards/")

Sizes = dict[str, tuple[int, int]]  # name: bytes and time of the local file that lies at the URL


def fetch_work(store: Store, work: Path) -> Sizes:
    """Fetch the files that are not here yet; returns what is now the same on both sides."""

    def ask() -> dict[str, int]:
        store.files.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            found = store.files.find(store.base, detail=True)
            return {path: int(entry["size"]) for path, entry in found.items()}
        return {}

    base = store.path("")
    there = {path.removeprefix(base): size for path, size in store.call("", ask).items()}
    there = {name: size for name, size in there.items() if _is_copied(name)}

    def fetch(name: str) -> None:
        if not (work / name).exists():
            store.get(name, work / name, there[name])

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(fetch, sorted(there)))
    return {name: _state(work / name) for name, size in there.items() if _state(work / name)[0] == size}


def put_work(store: Store, work: Path, same: Sizes) -> None:
    """Put the files that are new or changed; `same` is brought up to date."""
    names = (path.relative_to(work).as_posix() for path in work.rglob("*") if path.is_file())

    def put(name: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # it was replaced in this moment
            state = _state(work / name)
            if same.get(name) != state:
                store.put(work / name, name)
                same[name] = state

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(put, sorted(filter(_is_copied, names))))


@contextlib.contextmanager
def work_copied(store: Store | None, work: Path, *, every: float = EVERY) -> Iterator[None]:
    """Keep a copy of `work` at the store's URL while the block runs, also when it fails; None keeps none.

    LmrError when the URL can not be read before, or not be written at the end; in between a failure is tried again.
    """
    if store is None:
        yield
        return
    same, over = fetch_work(store, work), threading.Event()

    def watch() -> None:
        pause = every
        while not over.wait(pause):
            start = time.monotonic()
            with contextlib.suppress(LmrError, OSError):
                put_work(store, work, same)
            pause = max(every, 10 * (time.monotonic() - start))

    watching = threading.Thread(target=watch, name="work copy", daemon=True)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()
        put_work(store, work, same)


def _is_copied(name: str) -> bool:
    parts = name.split("/")
    # Names of a foreign listing must not lead out of the folder.
    return not name.startswith(NOT_COPIED) and not any(part.startswith(".") or not part for part in parts)


def _state(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_size, state.st_mtime_ns
