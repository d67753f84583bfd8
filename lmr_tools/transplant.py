"""Shards from shards: pictures are taken over as packed, only what a sample says of itself may change.

A shard from which all groups are taken unchanged is copied as a file, so its bytes stay. Imports `packing` and
`shards`, which know what lies in a tar.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lmr_tools.packing import describe, group_of
from lmr_tools.schema import GroupRow, LmrError, Split
from lmr_tools.shards import CountedFile, WrittenShard, index_shard, read_samples, write_samples
from lmr_tools.tables import atomic_path, fingerprint, read_json, sha256_file, write_json

TRANSPLANT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Graft:
    """One tar to be: from which tar, which of its groups under which rows, and the paths of their photos.

    `groups` holds (id in the donor, the new rows of the `groups` table). `whole`: nothing changes, the file is copied.
    """

    name: str
    donor: Path
    donor_sha256: str
    groups: tuple[tuple[str, tuple[GroupRow, ...]], ...]
    paths: Mapping[str, str]
    whole: bool


def graft(plan: Graft, *, folder: Path, work: Path) -> WrittenShard:
    """Write one tar, unless an earlier run wrote it. LmrError when the donor is not the tar its table names."""
    path, receipt = folder / plan.name, work / f"{plan.name}.json"
    own = {**dataclasses.asdict(plan), "donor": str(plan.donor)}
    key = fingerprint(TRANSPLANT_VERSION, own)
    if path.is_file() and receipt.is_file():
        try:
            kept, found = read_json(receipt), index_shard(path)
            if kept["key"] == key and kept["sha256"] == found.row.sha256:
                return found
        except (LmrError, OSError, KeyError, TypeError):
            pass  # damaged: it is made again
    path.unlink(missing_ok=True)
    if plan.whole:
        with atomic_path(path) as temporary:
            shutil.copyfile(_existing(plan.donor), temporary)
            if sha256_file(temporary) != plan.donor_sha256:
                raise _altered(plan.donor)
            written = index_shard(temporary, plan.name)
    else:
        written = write_samples(path, _samples(plan))
    write_json(receipt, {"key": key, "sha256": written.row.sha256})
    return written


def _existing(donor: Path) -> Path:
    if not donor.is_file():
        raise LmrError(f"{donor}: no such shard; a dataset without its shards can be rebuilt from photos (lmr rebuild)")
    return donor


def _altered(donor: Path) -> LmrError:
    return LmrError(f"{donor}: is not the shard that its table names (sha256); run lmr verify on that dataset")


def _samples(plan: Graft) -> Iterator[Mapping[str, str | bytes]]:
    wanted = dict(plan.groups)
    with _existing(plan.donor).open("rb") as stream:
        file = CountedFile(stream)
        for packed in read_samples(file, str(plan.donor)):
            if packed.group_id in wanted:
                yield _regrouped(packed.members, packed.group_id, wanted.pop(packed.group_id), plan.paths)
        if file.sha256() != plan.donor_sha256:
            raise _altered(plan.donor)
    if wanted:
        raise LmrError(f"{plan.donor}: does not hold group {sorted(wanted)[0]}; run lmr verify on that dataset")


def _regrouped(
    members: Mapping[str, bytes], key: str, rows: tuple[GroupRow, ...], paths: Mapping[str, str]
) -> dict[str, str | bytes]:
    """A sample as `rows` name it: its pictures as they are, fewer of them perhaps, and a JSON that agrees."""
    old = group_of(key, dict(members), decode=False)
    number = {reference.slot: place for place, reference in enumerate(old.references)}
    chosen = [number[row.slot] for row in rows]
    group = dataclasses.replace(
        old,
        group_id=rows[0].group_id,
        scene=rows[0].scene,
        split=Split(rows[0].split),
        target_path=paths[old.target_image],
        references=tuple(
            dataclasses.replace(old.references[n], path=paths[old.references[n].image_id]) for n in chosen
        ),
    )
    sample: dict[str, str | bytes] = {"__key__": group.group_id, "target.png": members["target.png"]}
    for place, n in enumerate(chosen):
        sample[f"ref{place}.png"] = members[f"ref{n}.png"]
    sample["json"] = json.dumps(describe(group), separators=(",", ":"), allow_nan=False).encode()
    return sample
