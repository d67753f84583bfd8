"""Photos and a reconstruction of them: what each photo observes, and which photos share most, ready for `pairs`.

Imports `colmap_model` and `observations`, which it puts together, `pairs`, whose store it fills, `sources` and
`turning`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lmr_tools.colmap_model import Model, model_folders, read_model
from lmr_tools.observations import most_shared, name_photos, observations_to_bytes, observe
from lmr_tools.pairs import PairStore, observation_file
from lmr_tools.schema import ImageRow, LmrError
from lmr_tools.sources import Source
from lmr_tools.tables import fingerprint, write_bytes
from lmr_tools.turning import orientation
from lmr_tools.workers import Mapper, Tracker


@dataclass(frozen=True, kw_only=True)
class Observed:
    """A pair store over a reconstruction; `known` (N,): which photos it knows, `near` (N, k): who shares most."""

    store: PairStore
    known: npt.NDArray[np.bool_]
    near: npt.NDArray[np.int32]
    about: Mapping[str, Any]  # for the manifest

    def candidates(self, mined: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """(N, any): the mined candidates that are in the reconstruction, and those that share most points."""
        possible = (mined >= 0) & self.known[mined] & self.known[:, None]
        return np.concatenate([np.where(possible, mined, -1), self.near], axis=1).astype(np.int32)


def read_models(paths: Sequence[Path]) -> list[Model]:
    """All models at or below `paths`, each folder once."""
    folders = dict.fromkeys(folder for path in paths for folder in model_folders(path))
    return [read_model(folder) for folder in folders]


def observe_all(
    models: Sequence[Model],
    photos: Sequence[ImageRow],
    sources: Sequence[Source],
    store: PairStore,
    mapper: Mapper,
    track: Tracker,
    *,
    k: int,
) -> Observed:
    """Write what every photo observes into the store; LmrError when no photo is in a model.

    Photos that no model names, or whose shape is not that of the model's picture, have no pairs.
    """
    named = name_photos(models, {row.image_id: row.path for row in photos})
    wanted = [row for row in photos if row.image_id in named]
    turns = track(mapper(partial(orientation, sources=tuple(sources)), wanted), len(wanted), "headers")
    turn_of = dict(zip([row.image_id for row in wanted], turns, strict=True))
    own = replace(store, model=fingerprint([model.fingerprint for model in models]))
    seen = []
    for row in photos:
        value = None
        if row.image_id in named:
            number, image = named[row.image_id]
            value = observe(number, image, row, turn_of[row.image_id])
        if value is not None:
            write_bytes(observation_file(own, row.sha256), observations_to_bytes(value))
        seen.append(value)
    known = np.array([value is not None for value in seen])
    images = sum(len(model.images) for model in models)
    if not known.any():
        raise LmrError(
            f"{models[0].folder}: none of {len(photos)} photos is one of its {images} images "
            f"({len(named)} by name, but of another shape); their names must end alike, as {_example(models)}"
        )
    about = {
        "kind": "colmap",
        "models": [
            {"sha256": model.fingerprint, "images": len(model.images), "points": model.points} for model in models
        ],
        "images": images,
        "photos": int(known.sum()),
        "other_shape": len(named) - int(known.sum()),
    }
    return Observed(store=own, known=known, near=most_shared(seen, k), about=about)


def _example(models: Sequence[Model]) -> str:
    return next((image.name for model in models for image in model.images), "no image")
