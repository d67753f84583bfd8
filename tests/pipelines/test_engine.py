"""Ray and object stores give the bytes of a local build, also when drivers and nodes are killed and calls fail."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from unittest import mock

import pytest
from click.testing import CliRunner

from lmr_tools.config import BuildConfig
from lmr_tools.dataset import claim
from pipelines.build_dataset import build
from pipelines.cli import cli

from ..lmr_tools.test_remote import Flaky
from .small_build import RECIPE, StandInEmbedder, bytes_of, run, write_photos

ROOT = Path(__file__).resolve().parents[2]
DRIVER = """
import sys
from pathlib import Path
from unittest import mock
from lmr_tools.config import BuildConfig
from lmr_tools.dataset import claim
from pipelines.build_dataset import build
from tests.pipelines.small_build import RECIPE, StandInEmbedder
out = Path(sys.argv[2])
with mock.patch("lmr_tools.embed.OpenClipEmbedder", StandInEmbedder), claim(out):
    build((sys.argv[1],), out, BuildConfig(**RECIPE), engine="ray", address=sys.argv[3])
"""


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_builds_the_same_bytes_while_its_driver_and_a_node_are_killed(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    photos, out = tmp_path / "photos", tmp_path / "cluster"
    write_photos(photos, places=3, views=5)
    run(photos, tmp_path / "local")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80 * 2**20})
        doomed = cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    # The driver dies at the first feature files: the scan is over, embedders are up, geometry has not begun.
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(photos), str(out), cluster.address],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        stderr=subprocess.DEVNULL,
    )
    while driver.poll() is None and len(list(out.glob("work/features-*/*/*.sift"))) < 2:
        time.sleep(0.05)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    assert not (out / "dataset.json").exists()
    killed = threading.Event()

    def kill_when_it_works() -> None:
        while not killed.wait(0.05):  # the node dies once pairs are measured
            if any(out.glob("work/pairs-*/*/*.npz")):
                cluster.remove_node(doomed, allow_graceful=False)
                killed.set()

    watch = threading.Thread(target=kill_when_it_works)
    watch.start()
    try:
        with mock.patch("lmr_tools.embed.OpenClipEmbedder", StandInEmbedder), claim(out):
            build((str(photos),), out, BuildConfig(**RECIPE), engine="ray", address=cluster.address)
        assert killed.is_set()
    finally:
        killed.set()
        watch.join()
        cluster.shutdown()
    assert bytes_of(out) == bytes_of(tmp_path / "local")


def test_an_address_without_ray_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    arguments = ["build-dataset", str(tmp_path / "a.png"), "--out", str(tmp_path / "d"), "--address", "auto"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    assert "--address is for --engine ray" in result.output


def test_a_url_needs_a_folder_to_build_in(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    for extra in (["--out", "s3://bucket/x"], ["--out", str(tmp_path / "d"), "--work", str(tmp_path / "w")]):
        result = CliRunner().invoke(cli, ["build-dataset", str(tmp_path / "a.png"), *extra])
        assert result.exit_code == 2
        assert "--work names the folder to build in" in result.output


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_build_from_a_failing_s3_store_to_itself(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    from lmr_tools import sources, stores

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    write_photos(tmp_path / "photos", places=2, views=4)
    run(tmp_path / "photos", tmp_path / "local")
    files = fsspec.filesystem("s3", use_listings_cache=False)
    files.mkdir("crawl")
    files.put(str(tmp_path / "photos"), "crawl/photos", recursive=True)
    flaky = Flaky(files, 0.05, seed=4)
    url_to_fs = fsspec.core.url_to_fs
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url, **more: (flaky, url_to_fs(url, **more)[1]))
    monkeypatch.setattr(stores.time, "sleep", lambda seconds: None)
    sources._filesystem.cache_clear()
    settings = [text for key, value in RECIPE.items() for text in ("--set", f"{key}={str(value).lower()}")]
    arguments = ["build-dataset", "s3://crawl/photos", "--out", "s3://crawl/set", "--work", str(tmp_path / "here")]
    with mock.patch("lmr_tools.embed.OpenClipEmbedder", StandInEmbedder):
        result = CliRunner().invoke(cli, [*arguments, *settings, "--workers", "1"])
    assert result.exit_code == 0, result.output
    counted = re.findall(r"(\d+) calls made again", result.output)
    assert len(counted) == 2
    assert sum(map(int, counted)) == flaky.failed > 3
    monkeypatch.undo()
    sources._filesystem.cache_clear()
    local = bytes_of(tmp_path / "here")
    assert {name: files.cat_file(f"crawl/set/{name}") for name in local} == local
    same = [name for name in local if name.endswith(".tar") or "pairs" in name or "groups" in name]
    assert len(same) > 4
    assert {name: local[name] for name in same} == {name: bytes_of(tmp_path / "local")[name] for name in same}
    written = [path.read_bytes() for path in (tmp_path / "here").rglob("*") if path.is_file()]
    assert not any(secret in data for secret in (b"hush-hush", b"AKIDEXAMPLE") for data in written)
    assert "hush-hush" not in result.output


def test_a_dataset_can_be_built_into_a_url(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", places=2, views=4)
    settings = [text for key, value in RECIPE.items() for text in ("--set", f"{key}={str(value).lower()}")]
    arguments = ["build-dataset", str(tmp_path / "photos"), "--out", (tmp_path / "far").as_uri(), *settings]
    with mock.patch("lmr_tools.embed.OpenClipEmbedder", StandInEmbedder):
        result = CliRunner().invoke(cli, [*arguments, "--work", str(tmp_path / "here"), "--workers", "1"])
    assert result.exit_code == 0, result.output
    assert "files put, 0 there, 0 calls made again" in result.output
    assert bytes_of(tmp_path / "far") == bytes_of(tmp_path / "here")


def test_a_build_goes_on_elsewhere_from_the_copy_of_its_work_files(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", places=2, views=4)
    settings = [text for key, value in RECIPE.items() for text in ("--set", f"{key}={str(value).lower()}")]
    outputs = []
    for name in ("first", "second"):
        arguments = ["build-dataset", str(tmp_path / "photos"), "--out", str(tmp_path / name), "--workers", "1"]
        with mock.patch("lmr_tools.embed.OpenClipEmbedder", StandInEmbedder):
            result = CliRunner().invoke(cli, [*arguments, *settings, "--work-copy", (tmp_path / "copy").as_uri()])
        assert result.exit_code == 0, result.output
        outputs.append({stage: int(count) for stage, count in re.findall(r"^(\w+) +(\d+) in", result.output, re.M)})
    assert outputs[0]["embed"] == outputs[0]["features"] == 8
    assert outputs[1]["embed"] == outputs[1]["features"] == 0
    assert bytes_of(tmp_path / "first") == bytes_of(tmp_path / "second")
