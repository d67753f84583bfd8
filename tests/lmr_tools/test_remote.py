"""Publishing to a local S3 server: failing calls, stuck calls, stops half-way, two writers, secrets."""

import io
import random
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lmr_tools import sources, stores
from lmr_tools.dataset import FORMAT, VERSION
from lmr_tools.images import BadImage
from lmr_tools.remote import CLAIM, publish
from lmr_tools.schema import LmrError
from lmr_tools.stores import CountingMapper, Store, without_secrets
from lmr_tools.tables import write_json
from lmr_tools.workers import ProcessMapper

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture
def bucket(server: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    name = f"b{abs(hash(request.node.name))}"

    def store(**options: Any) -> Store:
        return Store(
            f"s3://{name}/set", pause=0.0, key="AKIDEXAMPLE", secret="hush", endpoint_url=server,
            use_listings_cache=False, skip_instance_cache=True, **options,
        )  # fmt: skip

    store().files.mkdir(name)
    yield store


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "dataset"
    for name, size in (("shards/train-000000.tar", 200_000), ("tables/images.parquet", 5000), ("README.md", 10)):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random.Random(name).randbytes(size))
    (folder / "work").mkdir()
    (folder / "work" / "huge.sift").touch()
    (folder / ".lmr-dataset").touch()
    write_json(folder / "dataset.json", {"format": FORMAT, "version": VERSION})
    return folder


class Flaky:
    """A file system of whose calls a seeded share fails, before or after it did its work."""

    def __init__(self, files: Any, share: float, seed: int = 1) -> None:
        self._files, self._share, self._random = files, share, random.Random(seed)
        self.failed, self.log = 0, list[str]()

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._files, name)
        if not callable(real) or name == "invalidate_cache":
            return real

        def call(*arguments: Any, **options: Any) -> Any:
            self.log.append(f"{name} {arguments[-1] if arguments else ''}")
            fails, late = self._random.random() < self._share, self._random.random() < 0.5
            if fails and not late:
                self.failed += 1
                raise OSError("503 SlowDown; key AKIDEXAMPLE")
            result = real(*arguments, **options)
            if fails:
                self.failed += 1
                raise TimeoutError("reset by peer")
            return result

        return call


def content(store: Store) -> dict[str, bytes]:
    found = store.files.find(store.base)
    return {path.removeprefix(store.base + "/"): store.files.cat_file(path) for path in found}


def local(dataset: Path) -> dict[str, bytes]:
    names = ("shards/train-000000.tar", "tables/images.parquet", "README.md", "dataset.json")
    return {name: (dataset / name).read_bytes() for name in names}


def test_a_dataset_arrives_whole_and_only_changes_are_sent_again(bucket: Any, dataset: Path) -> None:
    done = publish(dataset, bucket())
    assert (done.uploaded, done.kept) == (4, 0)
    assert content(bucket()) == local(dataset)
    (dataset / "README.md").write_bytes(b"new")
    again = publish(dataset, bucket())
    assert (again.uploaded, again.kept) == (2, 2)
    assert content(bucket()) == local(dataset)


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_failing_calls_are_made_again_and_counted(bucket: Any, dataset: Path, share: float) -> None:
    for seed in range(5):
        store = bucket()
        store.files = flaky = Flaky(store.files, share, seed)
        (dataset / "README.md").write_bytes(str(seed).encode())
        done = publish(dataset, store)
        assert done.retried == flaky.failed
        assert content(bucket()) == local(dataset)


def test_the_manifest_leaves_first_and_comes_last(bucket: Any, dataset: Path) -> None:
    publish(dataset, bucket())
    (dataset / "README.md").write_bytes(b"new")
    store = bucket()
    store.files = flaky = Flaky(store.files, 0.0)
    publish(dataset, store)
    changes = [line for line in flaky.log if line.startswith(("put_file", "rm_file"))]
    assert changes[0].endswith("dataset.json")
    assert changes[0].startswith("rm_file")
    assert changes[-2].startswith("put_file")
    assert changes[-2].endswith("dataset.json")
    assert changes[-1].endswith(CLAIM)


def test_half_a_shard_is_not_taken_for_whole(bucket: Any, dataset: Path) -> None:
    publish(dataset, bucket())
    store = bucket()
    store.files.pipe_file(store.path("shards/train-000000.tar"), b"half")
    publish(dataset, bucket())
    assert content(bucket()) == local(dataset)


def test_a_store_that_keeps_less_than_it_was_given_is_an_error(bucket: Any, dataset: Path) -> None:
    store = bucket()
    store.files.put_file = lambda source, path: store.files.pipe_file(path, b"x")
    with pytest.raises(LmrError, match="loses data"):
        publish(dataset, store)
    assert "dataset.json" not in content(bucket())


def test_a_stopped_upload_goes_on(bucket: Any, dataset: Path) -> None:
    store = bucket()
    real = store.files.put_file

    def stop(source: str, path: str) -> None:
        if path.endswith(".tar"):
            raise PermissionError("stop here")
        real(source, path)

    store.files.put_file = stop
    with pytest.raises(PermissionError):
        publish(dataset, store)
    store.files.put_file = real
    assert "dataset.json" not in content(bucket())
    done = publish(dataset, bucket())
    assert done.kept == 1
    assert content(bucket()) == local(dataset)


def test_two_builds_into_one_place_are_refused(bucket: Any, dataset: Path, tmp_path: Path) -> None:
    store = bucket()
    store.files.pipe_file(store.path(CLAIM), b'{"owner": "other"}')
    with pytest.raises(LmrError, match="another build is writing there"):
        publish(dataset, store)
    assert set(content(store)) == {CLAIM}


def never(*_: Any) -> None:
    """Gives no answer; the threads left behind are daemons and end with the process."""
    threading.Event().wait()


def test_a_stuck_call_ends(dataset: Path, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "out"), limit=0.05, pause=0.0)
    with pytest.raises(LmrError, match=r"x: failed 7 times, at last: TimeoutError: no answer in 0\.05 s"):
        store.call("x", never)


def test_a_plain_folder_never_shows_half_a_file(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    publish(dataset, Store(out.as_uri(), pause=0.0))
    found = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert found == local(dataset)


def test_secrets_are_not_shown() -> None:
    text = "s3://KEY:S3cr3t@bucket/x?X-Amz-Signature=abc failed for wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"
    assert without_secrets(text) == "s3://bucket/x failed for ..."
    with pytest.raises(LmrError) as caught:
        Store("nosuch://KEY:S3cr3t@bucket/x")
    assert "S3cr3t" not in str(caught.value)
    for url in ("s3://KEY:S3cr3t@bucket/crawl", "https://KEY:S3cr3t@host/a.jpg?X-Amz-Signature=S3cr3t"):
        assert "S3cr3t" not in sources.parse_source(url).given
    assert sources.parse_source("s3://bucket/img?.jpg").given == "s3://bucket/img?.jpg"


def test_an_unfinished_dataset_is_not_published(bucket: Any, dataset: Path) -> None:
    (dataset / "dataset.json").unlink()
    with pytest.raises(LmrError, match="has not finished"):
        publish(dataset, bucket())
    assert content(bucket()) == {}


def test_photos_of_a_failing_store_are_read_all_the_same(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = bucket()
    names = [f"{number}.png" for number in range(12)]
    for name in names:
        store.files.pipe_file(store.path(name), name.encode())
    flaky = Flaky(store.files, 0.3)
    monkeypatch.setattr(sources, "_filesystem", lambda root: (flaky, store.base))
    monkeypatch.setattr(stores.time, "sleep", lambda seconds: None)
    given = [sources.parse_source(store.url)]
    found = sources.list_photos(given).found
    assert sorted(file.path for file in found) == sorted(names)
    assert [sources.read_bytes(given, file).decode() for file in found] == [file.path for file in found]
    assert flaky.failed > 0
    store.files.rm_file(store.path("3.png"))
    gone = next(file for file in found if file.path == "3.png")
    with pytest.raises(BadImage, match="unreadable"):
        sources.read_bytes(given, gone)


def test_a_tar_of_a_failing_store_is_listed_whole_and_a_broken_one_is_told_once(
    bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, data = bucket(), io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for number in range(5):
            info = tarfile.TarInfo(f"{number}.png")
            info.size = 700
            tar.addfile(info, io.BytesIO(bytes(700)))
    store.files.pipe_file(store.path("whole.tar"), data.getvalue())
    store.files.pipe_file(store.path("cut.tar"), data.getvalue()[:3000])
    flaky = Flaky(store.files, 0.5, seed=3)
    monkeypatch.setattr(sources, "_filesystem", lambda root: (flaky, store.base))
    monkeypatch.setattr(stores.time, "sleep", lambda seconds: None)
    found = sources.list_photos([sources.parse_source(store.url)])
    assert [file.path for file in found.found if "whole" in file.path] == [f"whole.tar::{n}.png" for n in range(5)]
    assert [(file.path, reason) for file, reason, _ in found.refused] == [("cut.tar", "broken tar")]
    assert flaky.failed > 0
    assert len([line for line in flaky.log if line.startswith("open")]) <= 2 + flaky.failed


def test_a_photo_that_gives_no_answer_is_a_reject(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = bucket()
    store.files.pipe_file(store.path("a.png"), b"a")
    given = [sources.parse_source(store.url)]
    monkeypatch.setattr(sources, "_filesystem", lambda root: (store.files, store.base))
    (found,) = sources.list_photos(given).found
    monkeypatch.setattr(sources, "patiently", partial(stores.patiently, limit=0.05, pause=0.0))
    monkeypatch.setattr(sources, "_open", never)
    with pytest.raises(BadImage, match=r"failed 7 times, at last: TimeoutError: no answer in 0\.05 s"):
        sources.read_bytes(given, found)


def again(number: int) -> int:
    """A call that fails `number` times."""
    tries = iter(range(number))

    def action() -> int:
        if next(tries, None) is not None:
            raise OSError("503 SlowDown")
        return number

    return stores.patiently("x", action, pause=0.0)


@pytest.mark.parametrize("workers", [1, 2])
def test_calls_that_workers_made_again_are_counted(workers: int) -> None:
    again(3)  # before
    with ProcessMapper(workers) as running:
        mapper = CountingMapper(running)
        assert list(mapper(again, range(6))) == list(range(6))
        again(4)  # in this process, outside of a stage
        assert mapper.made_again == sum(range(6)) + 4
