"""Which scenes of several datasets are one place: they share a photo or a near copy of one, or have one name.

All photos count that the tables tie to a scene, also those that no group uses. Imports `hash_search`, and `splits` for
the components.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from lmr_tools.hash_search import close_hashes
from lmr_tools.splits import components

Tables = Mapping[str, pa.Table]


def scenes_by_photo(tables: Tables) -> dict[str, str]:
    """Scene of every photo that is in a group, in a verified pair with such a photo (over any number of steps), or that
    has the label of such a photo."""
    groups, images, pairs = tables["groups"], tables["images"], tables["pairs"]
    scene: dict[str, str] = {}
    for column in ("target_image", "ref_image"):
        scene |= zip(groups[column].to_pylist(), groups["scene"].to_pylist(), strict=True)
    good = images.filter(pc.not_equal(images["status"], "rejected"))
    names = good["image_id"].to_pylist()
    number = {name: place for place, name in enumerate(names)}
    verified = pairs.filter(pc.and_(pc.equal(pairs["hops"], 1), pc.is_valid(pairs["tier"])))
    ends = zip(verified["target_image"].to_pylist(), verified["ref_image"].to_pylist(), strict=True)
    edges = [(number[a], number[b]) for a, b in ends if a in number and b in number]
    first: dict[str, int] = {}
    for place, label in enumerate(good["scene"].to_pylist()):
        if label is not None:
            edges.append((first.setdefault(label, place), place))
    root = components(len(names), edges)
    of_root = {root[number[name]]: own for name, own in scene.items() if name in number}
    return {name: of_root[root[place]] for place, name in enumerate(names) if root[place] in of_root} | scene


def shared_places(parts: Sequence[Tables], *, max_bits: int) -> tuple[list[tuple[str, str]], int]:
    """(links between scenes, written `<part>:<scene>`, how many near copies there are between parts)."""
    scenes = [
        {name: f"{number}:{scene}" for name, scene in scenes_by_photo(tables).items()}
        for number, tables in enumerate(parts)
    ]
    hashes: dict[str, str] = {}
    for tables in parts:
        hashes |= zip(tables["images"]["image_id"].to_pylist(), tables["images"]["phash"].to_pylist(), strict=True)
    links: list[tuple[str, str]] = []
    close = 0
    for number, own in enumerate(scenes):
        photos = [name for name in own if hashes[name]]
        for other in scenes[number + 1 :]:
            links += [(own[name], other[name]) for name in own if name in other]
            fresh = [name for name in other if name not in own and hashes[name]]
            found = close_hashes([hashes[name] for name in photos], [hashes[name] for name in fresh], max_bits)
            near = [(own[photos[a]], other[fresh[b]]) for a, b, _ in found]
            links += near
            close += len(near)
    # A scene's name is a photo of it, or its published label: one name, one place.
    first: dict[str, str] = {}
    links += [
        (first.setdefault(scene.split(":", 1)[1], scene), scene)
        for own in scenes
        for scene in dict.fromkeys(own.values())
    ]
    return list(dict.fromkeys(links)), close
