"""Progress of long work: a bar on a terminal, plain lines elsewhere; always on stderr, data stays on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

PLAIN_SECONDS = 15.0


def note(text: str) -> None:
    """One line for the person watching."""
    print(text, file=sys.stderr, flush=True)


def track(items: Iterable[Item], total: int, label: str) -> Iterator[Item]:
    """Yield the items and show how far they are: `label`, count, rate, time left; one summary line at the end."""
    start = time.monotonic()
    count = 0
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=total)
            for item in items:
                yield item
                count += 1
                bar.advance(task)
    else:
        shown = start
        for item in items:
            yield item
            count += 1
            if time.monotonic() - shown > PLAIN_SECONDS:
                shown = time.monotonic()
                note(f"{label:<10} {count:>8} of {total}")
    seconds = time.monotonic() - start
    note(f"{label:<10} {count:>8} in {seconds:.1f} s" + (f" ({count / seconds:.1f}/s)" if seconds > 0.05 else ""))
