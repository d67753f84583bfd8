"""The first signal is remembered, the second one ends the process as it would without us."""

import signal
import subprocess
import sys

import pytest

CHILD = """
import signal
from mrefsr.stopping import StopRequest

signal.signal(signal.SIGINT, signal.{before})  # a test run in the background was started to ignore it

def say(*words):
    print(*words, flush=True)

with StopRequest() as stop:
    say(stop.asked)
    signal.raise_signal(signal.SIG{first})
    say(stop.asked)
    try:
        signal.raise_signal(signal.SIG{second})
    except KeyboardInterrupt:
        say("interrupted")
        raise
    say("survived")
"""


def run(first: str, second: str, before: str) -> subprocess.CompletedProcess[str]:
    program = CHILD.format(first=first, second=second, before=before)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize(
    ("first", "second", "code", "words"),
    [
        ("INT", "INT", -signal.SIGINT, ["False", "True", "interrupted"]),
        ("TERM", "TERM", -signal.SIGTERM, ["False", "True"]),
        ("TERM", "INT", -signal.SIGINT, ["False", "True", "interrupted"]),
    ],
)
def test_the_second_signal_ends_at_once(first: str, second: str, code: int, words: list[str]) -> None:
    child = run(first, second, "default_int_handler")
    assert (child.returncode, child.stdout.split()) == (code, words), child.stderr


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    child = run("INT", "INT", "SIG_IGN")
    assert (child.returncode, child.stdout.split()) == (0, ["False", "False", "survived"]), child.stderr
