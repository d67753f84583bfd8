"""The copy of the work files at a URL: whole files, both ways, under failing calls, and nothing from outside."""

import time
from pathlib import Path
from typing import Any

import pytest

from lmr_tools import stores
from lmr_tools.schema import LmrError
from lmr_tools.stores import Store
from lmr_tools.workcopy import fetch_work, put_work, work_copied

from .test_remote import Flaky

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

FILES = {"scan-1/000000.parquet": b"looks", "features-x/ab/abc.sift": b"f" * 9000, "pairs-x/ab/abc.npz": b"p" * 400}
OTHERS = {"index-m/ivf.faiss": b"i", "shards/train-000000.json": b"{}", "published-1.json": b"{}", "a/.b.1.tmp": b"t"}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def read(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def s3(server: str, request: pytest.FixtureRequest) -> Any:
    name = f"w{abs(hash(request.node.name))}"
    options = {"key": "k", "secret": "s", "endpoint_url": server, "use_listings_cache": False}
    Store(f"s3://{name}", **options).files.mkdir(name)
    return lambda: Store(f"s3://{name}/work", pause=0.0, **options)


def test_work_arrives_on_another_machine_though_calls_fail(s3: Any, tmp_path: Path) -> None:
    here, there = write(tmp_path / "here", FILES | OTHERS), tmp_path / "there"
    for seed, files in ((1, FILES), (2, FILES | {"pairs-x/ab/abc.npz": b"q" * 500, "new/a.b": b"1"})):
        write(here, files)
        store = s3()
        store.files = flaky = Flaky(store.files, 0.3, seed)
        with work_copied(store, here):
            pass
        same = fetch_work(store, there)
        assert flaky.failed > 0
        assert store.retried > 0
        # What is there already stays as it is.
        assert read(there) == files | FILES
        assert same.keys() == {name for name in files if files[name] == (files | FILES)[name]}
    assert s3().files.cat_file(s3().path("pairs-x/ab/abc.npz")) == b"q" * 500


def test_only_what_is_new_is_put(s3: Any, tmp_path: Path) -> None:
    here, store = write(tmp_path, FILES), s3()
    same = fetch_work(store, here)
    assert same == {}
    put_work(store, here, same)
    store.files = flaky = Flaky(store.files, 0.0)
    put_work(store, here, same)
    assert not any(line.startswith("put_file") for line in flaky.log)
    write(here, {"pairs-x/ab/abc.npz": b"n" * 400})
    put_work(store, here, same)
    assert [line for line in flaky.log if line.startswith("put_file")] == [
        f"put_file {store.path('pairs-x/ab/abc.npz')}"
    ]
    assert fetch_work(s3(), here).keys() == FILES.keys()


def test_it_is_put_while_the_build_runs_and_when_it_fails(tmp_path: Path) -> None:
    here, url = tmp_path / "here", (tmp_path / "far").as_uri()
    with pytest.raises(KeyboardInterrupt), work_copied(Store(url), here, every=0.05):
        write(here, {"a.x": b"1"})
        waited = time.monotonic()
        while not (tmp_path / "far" / "a.x").is_file() and time.monotonic() < waited + 900:
            time.sleep(0.01)
        assert read(tmp_path / "far") == {"a.x": b"1"}
        write(here, {"b.x": b"2"})
        raise KeyboardInterrupt
    assert read(tmp_path / "far") == read(here) == {"a.x": b"1", "b.x": b"2"}


def test_half_a_file_is_never_here_and_no_name_leads_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    far = write(tmp_path / "far", {"a/b.x": b"whole", ".hidden": b"h"})
    store = Store(far.as_uri(), pause=0.0)
    get_file = store.files.get_file
    monkeypatch.setattr(store.files, "get_file", lambda there, here: Path(here).write_bytes(b"who"))
    monkeypatch.setattr(stores.time, "sleep", lambda seconds: None)
    with pytest.raises(LmrError, match=r"a/b\.x: failed 7 times, at last: OSError: 3 of 5 bytes arrived"):
        fetch_work(store, tmp_path / "here")
    assert read(tmp_path / "here") == {}
    monkeypatch.setattr(store.files, "get_file", get_file)
    found = {store.path(name): {"size": 1} for name in ("../out.x", "a/../../out.x", "/out.x")}
    monkeypatch.setattr(store.files, "find", lambda *_, **__: found)
    assert fetch_work(store, tmp_path / "here") == {}
