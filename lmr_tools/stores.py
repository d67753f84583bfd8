"""Object stores and other fsspec URLs as they are in the wild: calls fail, hang, and carry secrets in their messages.

`patiently` repeats what failed and gives every call a time limit; `Store` does so for every call to one URL, counts,
and puts files so that nobody meets half of one. `CountingMapper` counts over the processes of a build.
"""

from __future__ import annotations

import functools
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from lmr_tools.schema import LmrError
from lmr_tools.tables import atomic_path
from lmr_tools.workers import Mapper

Item = TypeVar("Item")
Result = TypeVar("Result")

PROCESS = uuid.uuid4().hex  # process ids repeat on the nodes of a cluster
_made_again = [0]  # calls that this process made again
_counting = threading.Lock()

TRIES = 7  # of one call: of calls that fail once in twenty, one in a billion is given up
FIRST_PAUSE = 0.2  # seconds; doubled after every failure
LIMIT = 300.0  # seconds that one call may take
# Stores that show a file only when it is whole; elsewhere files are put beside and renamed.
WHOLE_OR_NOTHING = {"s3", "s3a", "gs", "gcs", "abfs", "az", "memory"}
# What another try can not mend.
FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)


def without_secrets(text: str, *, place: bool = False) -> str:
    """A message without user:password@ parts, query strings and long tokens; a `place` (URL) keeps its long names."""
    text = re.sub(r"(\w+://)[^/@\s]*@", r"\1", text)
    # In a place a question mark may be a wildcard: only what names values is a query.
    text = re.sub(r"\?[^\s'\"]*=[^\s'\"]*" if place else r"\?[^\s'\"]*", "", text)
    return text if place else re.sub(r"[A-Za-z0-9+/=]{32,}", "...", text)


def patiently(
    place: str,
    action: Callable[[], Result],
    *,
    limit: float = LIMIT,
    pause: float = FIRST_PAUSE,
    again: Callable[[], None] = lambda: None,
) -> Result:
    """Run `action`; on a failure or when it is stuck, wait and run it again. LmrError naming `place` after TRIES.

    `FileNotFoundError`, `FileExistsError` and `PermissionError` pass through at once; `again` is told of every repeat.
    """
    for number in range(TRIES):
        try:
            return within(action, limit)
        except FINAL:
            raise
        except Exception as error:  # every store has errors of its own
            reason = f"{type(error).__name__}: {without_secrets(str(error))[:120]}"
        if number < TRIES - 1:
            with _counting:
                _made_again[0] += 1
                again()
            time.sleep(pause * 2**number)
    raise LmrError(
        f"{without_secrets(place, place=True)}: failed {TRIES} times, at last: {reason}; run the command again later"
    )


def within(action: Callable[[], Result], limit: float) -> Result:
    """What `action` returns or raises; TimeoutError after `limit` seconds. A stuck call can only be left behind."""
    outcome: list[Result] = []
    problem: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(action())
        except BaseException as error:
            problem.append(error)

    thread = threading.Thread(target=run, name="store", daemon=True)
    thread.start()
    thread.join(limit)
    if problem:
        raise problem[0]
    if not outcome:
        raise TimeoutError(f"no answer in {limit:g} s")
    return outcome[0]


class CountingMapper:
    """A `Mapper` over another one that counts what `patiently` made again, in the workers and in this process."""

    def __init__(self, mapper: Mapper) -> None:
        self._mapper, self._elsewhere, self._before = mapper, 0, _made_again[0]

    def __call__(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        for process, again, result in self._mapper(functools.partial(_counted, function=function), items):
            self._elsewhere += again if process != PROCESS else 0
            yield result

    @property
    def made_again(self) -> int:
        """Calls made again since this mapper was made."""
        return self._elsewhere + _made_again[0] - self._before


def _counted(item: Item, *, function: Callable[[Item], Result]) -> tuple[str, int, Result]:
    before = _made_again[0]
    result = function(item)
    return PROCESS, _made_again[0] - before, result


class Store:
    """The file system behind a URL; `retried` counts calls that were made again, `options` go to fsspec."""

    def __init__(self, url: str, *, limit: float = LIMIT, pause: float = FIRST_PAUSE, **options: Any) -> None:
        import fsspec

        self.url, self.limit, self.pause, self.retried = url.rstrip("/"), limit, pause, 0
        self.shown = without_secrets(self.url, place=True)
        try:
            self.files, self.base = fsspec.core.url_to_fs(self.url, **options)
        except (ImportError, ValueError) as error:
            raise LmrError(f"{self.shown}: {without_secrets(str(error).splitlines()[0])}") from None

    def path(self, name: str) -> str:
        """The store's name of a file below the URL."""
        return f"{self.base.rstrip('/')}/{name}"

    def call(self, name: str, action: Callable[[], Result]) -> Result:
        """`patiently`, with what was made again counted."""

        def again() -> None:
            self.retried += 1

        return patiently(f"{self.shown}/{name}", action, limit=self.limit, pause=self.pause, again=again)

    def size(self, name: str) -> int | None:
        """Bytes of a file as the store says, None if there is none."""

        def ask() -> int | None:
            self.files.invalidate_cache()
            try:
                return int(self.files.info(self.path(name))["size"])
            except FileNotFoundError:
                return None

        return self.call(name, ask)

    def put(self, source: Path, name: str) -> None:
        """Upload a file so that nobody meets half of it under its name; its size is checked afterwards."""
        wanted = source.stat().st_size
        for _ in range(TRIES):
            self.call(name, lambda: self._put(source, name))
            if self.size(name) == wanted:
                return
            self.retried += 1
        raise LmrError(f"{self.shown}/{name}: has not {wanted} bytes after {TRIES} uploads; the store loses data")

    def _put(self, source: Path, name: str) -> None:
        protocol = self.files.protocol
        names = {protocol} if isinstance(protocol, str) else set(protocol)
        if names & WHOLE_OR_NOTHING:
            self.files.put_file(str(source), self.path(name))
            return
        self.files.makedirs(self.path(name).rsplit("/", 1)[0], exist_ok=True)
        beside = self.path(name) + ".part"
        self.files.put_file(str(source), beside)
        self.files.mv(beside, self.path(name))

    def get(self, name: str, path: Path, size: int) -> None:
        """Fetch a file of `size` bytes; nobody meets half of it."""

        def take() -> None:
            with atomic_path(path) as temporary:
                self.files.get_file(self.path(name), str(temporary))
                if temporary.stat().st_size != size:
                    raise OSError(f"{temporary.stat().st_size} of {size} bytes arrived")

        self.call(name, take)

    def remove(self, name: str) -> None:
        """Remove a file that may not be there."""

        def drop() -> None:
            if self.files.exists(self.path(name)):
                self.files.rm_file(self.path(name))

        self.call(name, drop)
