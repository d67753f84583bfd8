"""What is made of the ends of several processes; how they train together is tested with `lmr train`."""

import signal
from typing import Any

import pytest

from mrefsr import machines

LOST = machines.PEER_LOST


class Process:
    """A stand-in for Popen: it has ended with `code`, or ends when it is killed."""

    def __init__(self, code: int | None) -> None:
        self.returncode = code

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        self.returncode = -signal.SIGKILL


@pytest.mark.parametrize(
    ("codes", "code", "said"),
    [
        ([0, 0], 0, ""),
        ([130, 130], 130, ""),
        ([LOST, 1], 1, ""),
        ([LOST, -signal.SIGTERM], 143, ""),
        ([LOST, -signal.SIGKILL], 1, "process 1 was killed; was memory short?\n"),
        ([LOST, None], 1, ""),  # one that did not end by itself
    ],
)
def test_the_exit_code_of_several_processes(
    codes: list[Any], code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machines, "GRACE", 0)
    assert machines._wait([Process(each) for each in codes]) == code  # type: ignore[arg-type]
    assert capsys.readouterr().err == said
