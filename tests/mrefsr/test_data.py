"""Batches follow from dataset, rule, seed and position alone; what is done to a target is done to its references.

The painted dataset tells by each pixel which column and row of which crop of which group it was.
"""

import itertools
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import psutil
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image as PilImage

from lmr_tools.schema import LmrError
from mrefsr.data import Batch, SampleRule, train_batches, validation_batches
from mrefsr.sampling import Draws, SceneMap, epoch_order, sample_at
from tests.lmr_tools.painted_dataset import PER_SCENE, SIZE, paint_dataset, painted

TRAIN, CROP = 11, 24
RULE = SampleRule(crop=CROP)
MIXED = SampleRule(crop=CROP, wrong_share=0.4, no_reference_share=0.2)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint_dataset(tmp_path_factory.mktemp("data") / "dataset", train=TRAIN)


def take(count: int, dataset: Any, **options: Any) -> list[Batch]:
    options = {"rule": MIXED, "batch_size": 3, "seed": 5} | options
    return list(itertools.islice(train_batches(dataset, **options), count))


def samples(batches: list[Batch]) -> list[tuple[Any, ...]]:
    """Each sample on its own: id, bytes of its pictures, bytes of the references that exist."""
    found = []
    for batch in batches:
        for row, group_id in enumerate(batch.group_ids):
            shown = batch.references[row][batch.mask[row]]
            parts = (batch.lr[row], batch.enlarged[row], batch.target[row], shown)
            found.append((group_id, *(part.numpy().tobytes() for part in parts)))
    return found


def pixels(picture: torch.Tensor) -> npt.NDArray[np.uint8]:
    """3,H,W in [0, 1] -> the H,W,3 uint8 it came from."""
    values = picture.permute(1, 2, 0).mul(255)
    assert torch.equal(values.round().div(255), picture.permute(1, 2, 0))
    return values.round().to(torch.uint8).numpy()


def origin(picture: npt.NDArray[np.uint8]) -> tuple[int, int]:
    """(group, slot) of a crop, the same in all its pixels."""
    (blue,) = set(picture[:, :, 2].ravel().tolist())
    return divmod(blue, 6)


def test_every_epoch_is_another_order_of_all_samples(dataset: Path) -> None:
    ids = [group_id for batch in take(11, dataset, batch_size=3) for group_id in batch.group_ids]
    epochs = [ids[start : start + TRAIN] for start in range(0, 33, TRAIN)]
    assert all(sorted(epoch) == [f"g{number:02d}" for number in range(TRAIN)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = [group_id for batch in take(4, dataset, seed=6) for group_id in batch.group_ids]
    assert other[:TRAIN] != ids[:TRAIN]
    places = np.array([[sample_at(p, 50, 1) for p in range(e * 50, e * 50 + 50)] for e in range(400)])
    # Each sample at the first place of an epoch about equally often: 400 draws of 50, mean 8.
    assert np.bincount(places[:, 0], minlength=50).max() < 25


def test_the_order_is_a_promise() -> None:
    """Fixed numbers: a run that goes on under a later version must meet the same samples."""
    assert epoch_order(8, 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert epoch_order(8, 0, 1).tolist() == [0, 1, 6, 5, 3, 7, 2, 4]
    draws = Draws(2**64 - 1, 1, 7)
    assert (draws.below(1000), draws.order(5), round(draws.unit(), 12)) == (304, [2, 0, 3, 4, 1], 0.003409749826)


@pytest.mark.parametrize("position", [1, 9, 11, 32])
def test_going_on_from_any_position_equals_the_whole_run(dataset: Path, position: int) -> None:
    whole = samples(take(16, dataset))
    rest = samples(take(4, dataset, position=position))
    assert rest == whole[position : position + 12]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_run_of_one_process(dataset: Path, world_size: int) -> None:
    whole = samples(take(4 * world_size, dataset, position=4))
    ranks = [take(4, dataset, position=4, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert samples([batch for step in zip(*ranks, strict=True) for batch in step]) == whole
    # The same samples in batches of another size.
    assert samples(take(12 * world_size // 4, dataset, position=4, batch_size=4)) == whole


def test_workers_change_nothing_and_end_with_the_iterator(dataset: Path) -> None:
    alone = samples(take(7, dataset, position=2))
    batches = train_batches(dataset, rule=MIXED, batch_size=3, seed=5, position=2, workers=2)
    made = list(itertools.islice(batches, 7))
    assert samples(made) == alone
    assert all(tensor.dtype == torch.float32 for tensor in (made[0].lr, made[0].references))
    children = psutil.Process().children(recursive=True)
    assert len([child for child in children if "spawn_main" in " ".join(child.cmdline())]) == 2
    batches.close()
    assert not [child for child in children if child.is_running() and "spawn_main" in " ".join(child.cmdline())]


@pytest.mark.parametrize("reference_crop", ["same", "whole"])
def test_target_and_references_are_cut_and_turned_alike(dataset: Path, reference_crop: Any) -> None:
    rule = SampleRule(crop=CROP, reference_crop=reference_crop)
    turns, corners = Counter[tuple[int, ...]](), set()
    for batch in take(60, dataset, rule=rule):
        for row, group_id in enumerate(batch.group_ids):
            target = pixels(batch.target[row])
            assert target.shape == (CROP, CROP, 3) and origin(target) == (int(group_id[1:]), 0)
            # Differences along rows and columns say how the window was turned, its values where it lay.
            across, down = (target[0, 1] - target[0, 0]).astype(np.int8), (target[1, 0] - target[0, 0]).astype(np.int8)
            turns[tuple(across[:2].tolist() + down[:2].tolist())] += 1
            x, y = (int(target[:, :, axis].min()) // 3 for axis in (0, 1))
            corners.add((x, y))
            window = (slice(y, y + CROP), slice(x, x + CROP))
            stored = painted(int(group_id[1:]), 0)[window]
            assert np.array_equal(*(np.unique(picture.reshape(-1, 3), axis=0) for picture in (target, stored)))
            for picture in batch.references[row][batch.mask[row]]:
                shown = pixels(picture)
                if reference_crop == "whole":
                    assert shown.shape == (SIZE, SIZE, 3)
                    first = np.argwhere((shown[:, :, :2] == target[0, 0, :2]).all(axis=2))[0]
                    shown = shown[first[0] : first[0] + CROP, first[1] : first[1] + CROP]
                assert np.array_equal(shown[:, :, :2], target[:, :, :2])
                assert origin(shown)[0] == int(group_id[1:])
    assert len(turns) == 8 and min(turns.values()) > 8
    assert {0, SIZE - CROP} <= {x for x, _ in corners} and {0, SIZE - CROP} <= {y for _, y in corners}
    plain = SampleRule(crop=CROP, augment=False)
    for batch in take(10, dataset, rule=plain):
        assert all(pixels(t)[0, 1, 0] == pixels(t)[0, 0, 0] + 3 for t in batch.target)
        assert all(pixels(t)[1, 0, 1] == pixels(t)[0, 0, 1] + 3 for t in batch.target)


def test_lr_is_pillows_bicubic_of_the_crop(dataset: Path) -> None:
    for batch in take(5, dataset):
        for target, lr, enlarged in zip(batch.target, batch.lr, batch.enlarged, strict=True):
            small = PilImage.fromarray(pixels(target)).resize((CROP // 4, CROP // 4), PilImage.Resampling.BICUBIC)
            assert np.array_equal(pixels(lr), np.asarray(small))
            large = small.resize((CROP, CROP), PilImage.Resampling.BICUBIC)
            assert np.array_equal(pixels(enlarged), np.asarray(large))


def test_references_are_drawn_in_number_and_order(dataset: Path) -> None:
    counts, firsts = Counter[int](), Counter[int]()
    for batch in take(80, dataset, rule=SampleRule(crop=CROP, min_references=2, max_references=4)):
        assert batch.mask.shape == batch.references.shape[:2] and batch.mask.any(0).all()
        assert not batch.references[~batch.mask].any()
        for row in range(3):
            slots = [origin(pixels(picture))[1] for picture in batch.references[row][batch.mask[row]]]
            assert len(set(slots)) == len(slots) and 0 not in slots
            assert batch.mask[row].tolist() == sorted(batch.mask[row].tolist(), reverse=True)
            counts[len(slots)] += 1
            firsts[slots[0]] += 1
    assert set(counts) == {2, 3, 4} and set(firsts) == {1, 2, 3, 4, 5}
    # 240 draws, mean 80 and 48, five standard deviations.
    assert min(counts.values()) > 80 - 5 * math.sqrt(240 * 2 / 9)
    assert min(firsts.values()) > 48 - 5 * math.sqrt(240 * 4 / 25)


def test_shares_of_wrong_and_of_no_references(dataset: Path) -> None:
    rule = SampleRule(crop=CROP, wrong_share=0.5, no_reference_share=0.25)
    without = mixed = 0
    kept = set()
    for batch in take(100, dataset, rule=rule):
        for row, group_id in enumerate(batch.group_ids):
            own = int(group_id[1:])
            groups = [origin(pixels(picture))[0] for picture in batch.references[row][batch.mask[row]]]
            wrong = {group for group in groups if group != own}
            assert all(group // PER_SCENE != own // PER_SCENE and group < TRAIN for group in wrong)
            assert len(wrong) <= 1
            without += not groups
            mixed += bool(wrong)
            kept |= {(len(groups), sum(group != own for group in groups))} if wrong else set()
    assert abs(without - 75) < 5 * math.sqrt(300 * 3 / 16)
    assert abs(mixed - 300 * 0.75 / 2) < 5 * math.sqrt(300 * 0.375 * 0.625)
    assert {(count, n) for count in range(1, 6) for n in range(1, count + 1)} == kept
    for batch in take(8, dataset, rule=SampleRule(crop=CROP, wrong_share=1, min_references=5)):
        assert batch.mask.all() and batch.mask.shape == (3, 5)
        for group_id, pictures in zip(batch.group_ids, batch.references, strict=True):
            assert {origin(pixels(picture))[0] for picture in pictures} - {int(group_id[1:])}
    none = take(2, dataset, rule=SampleRule(crop=CROP, no_reference_share=1))
    assert all(batch.references.shape == (3, 0, 3, CROP, CROP) and batch.mask.shape == (3, 0) for batch in none)


def test_an_option_leaves_what_others_give(dataset: Path) -> None:
    plain, mixed = take(6, dataset, rule=RULE), take(6, dataset, rule=MIXED)
    assert all(torch.equal(a.target, b.target) and a.group_ids == b.group_ids for a, b in zip(plain, mixed))


def test_wrong_scenes_are_evenly_drawn() -> None:
    scenes = np.array([2, 0, 0, 1, 2, 0])
    drawn = Counter(SceneMap(scenes).other(1, Draws(0, 1, n)) for n in range(600))
    assert set(drawn) == {0, 3, 4} and min(drawn.values()) > 200 - 5 * math.sqrt(600 * 2 / 9)
    assert [SceneMap(scenes).elsewhere(n) for n in range(6)] == [4, 3, 3, 5, 4, 3]


def test_partial_groups_give_what_they_have(tmp_path: Path) -> None:
    dataset = paint_dataset(tmp_path / "d", references=2)
    assert {int(n) for batch in take(20, dataset, rule=RULE) for n in batch.mask.sum(1)} == {1, 2}


def test_validation_is_whole_crops_in_fixed_order(tmp_path: Path) -> None:
    dataset = paint_dataset(tmp_path / "d", size=66)
    batches = list(validation_batches(dataset, batch_size=3))
    assert [batch.group_ids for batch in batches] == [("g11", "g12", "g13"), ("g14",)]
    for batch in batches:
        for row, group_id in enumerate(batch.group_ids):
            number = int(group_id[1:])
            assert np.array_equal(pixels(batch.target[row]), painted(number, 0, 66)[:64, :64])
            for slot in range(5):
                shown = pixels(batch.references[row, slot])
                assert np.array_equal(shown, painted(number, slot + 1, 66)[:64, :64])
    assert samples(list(validation_batches(dataset, batch_size=3, workers=1))) == samples(batches)
    ranks = [list(validation_batches(dataset, rank=rank, world_size=3)) for rank in range(3)]
    assert [[b.group_ids[0] for b in rank] for rank in ranks] == [["g11", "g14"], ["g12"], ["g13"]]
    assert len(list(validation_batches(dataset, limit=2))) == 2
    for batch in validation_batches(dataset, content="wrong", references=3):
        assert batch.mask.shape == (1, 3)
        assert {origin(pixels(p))[0] // PER_SCENE for p in batch.references[0]} - {int(batch.group_ids[0][1:]) // 2}
        assert int(batch.group_ids[0][1:]) // 2 not in {origin(pixels(p))[0] // 2 for p in batch.references[0]}
    assert next(validation_batches(dataset, content="none")).references.shape == (1, 0, 3, 64, 64)
    middle = next(validation_batches(dataset, crop=16))
    assert np.array_equal(pixels(middle.target[0]), painted(11, 0, 66)[25:41, 25:41])


def test_remote_datasets_train_alike(dataset: Path) -> None:
    files, base = fsspec.core.url_to_fs("memory://data-test/dataset")
    for path in dataset.rglob("*"):
        if path.is_file():
            files.pipe_file(f"{base}/{path.relative_to(dataset).as_posix()}", path.read_bytes())
    try:
        assert samples(take(5, "memory://data-test/dataset")) == samples(take(5, dataset))
    finally:
        MemoryFileSystem.store.clear()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_size": 12}, "split train has 11 groups, too few for batches of 12;"),
        ({"batch_size": 4, "world_size": 3}, "has 11 groups, too few for batches of 4 on 3 ranks"),
        ({"rule": SampleRule(crop=68)}, "crop 68: larger than the stored 64x64 crops"),
        ({"split": "test"}, "split test has no groups"),
        ({"position": -1}, "position -1"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
    ],
)
def test_bad_input_is_told_at_the_call(dataset: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(LmrError, match=text):
        train_batches(dataset, **{"rule": RULE, "batch_size": 2, "seed": 0} | options)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"crop": 26}, "crop 26: must be a multiple of 4"),
        ({"crop": 8}, "at least 12"),
        ({"min_references": 3, "max_references": 2}, "min_references 3, max_references 2"),
        ({"wrong_share": 1.1}, "wrong_share 1.1: must be between 0 and 1"),
        ({"no_reference_share": -1}, "no_reference_share -1"),
        ({"reference_crop": "half"}, "'same' or 'whole'"),
    ],
)
def test_bad_rules_are_refused(values: dict[str, Any], text: str) -> None:
    with pytest.raises(LmrError, match=text):
        SampleRule(**values)


def test_wrong_references_need_a_second_scene(tmp_path: Path) -> None:
    dataset = paint_dataset(tmp_path / "d", train=2, val=2)
    assert take(2, dataset, rule=RULE, batch_size=2)
    with pytest.raises(LmrError, match=r"wrong_share 0.4, but split train has one scene only; give wrong_share=0"):
        take(1, dataset, batch_size=2)
    with pytest.raises(LmrError, match="one scene only"):
        validation_batches(dataset, content="wrong")


def test_an_altered_shard_is_named_by_a_worker_as_here(dataset: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(dataset, tmp_path / "d")
    path = copy / "shards" / "train-000001.tar"
    data = bytearray(path.read_bytes())
    for place in range(600, len(data), 4096):
        data[place] ^= 1
    path.write_bytes(data)
    texts = []
    for workers in (0, 1):
        with pytest.raises(LmrError, match=r"train-000001.tar: sample g0[4-7]: its sha256") as caught:
            take(12, copy, workers=workers)
        texts.append(str(caught.value))
    assert texts[0] == texts[1] and "\n" not in texts[0]
