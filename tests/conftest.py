"""Fixtures that every test room may use."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Ray gives its workers niceness 15: beside other tests they would starve.
os.environ.setdefault("RAY_worker_niceness", "0")
SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The development material beside a checkout (photos, parity files); users do not have it, so tests skip."""
    if not (SHARED / "parity").is_dir():
        pytest.skip("no shared material beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """A local S3 server; the tests that need it are skipped where moto or s3fs is missing."""
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()
