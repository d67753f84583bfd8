"""Recipes: frozen, keyword-only, validated once; an unknown key is refused by name.

A recipe is a TOML or YAML file with the same names as the fields below; command-line options lie over it.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lmr_tools.schema import LmrError

CLIP_MODEL = "ViT-B-32"

Part = TypeVar("Part")
Recipe = TypeVar("Recipe", bound=BaseModel)


class BuildConfig(BaseModel):
    """Everything that decides what a built dataset holds, apart from the photos. Lengths are source pixels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scenes: Literal["none", "folder"] = Field("none", description="folder: the first sub-folder is the scene label")
    seed: int = Field(0, ge=0, description="seed of crop positions, splits and shard order")

    size: int = Field(300, ge=32, le=4096, description="side of target and reference crops")
    high: int = Field(1, ge=0, le=20, description="High references per group")
    medium: int = Field(2, ge=0, le=20, description="Medium references per group")
    low: int = Field(2, ge=0, le=20, description="Low references per group")
    allow_partial: bool = Field(False, description="keep groups that miss references (at least one)")
    strict_tiers: bool = Field(False, description="never fill a slot with a pair of a higher tier")
    groups_per_photo: int = Field(1, ge=1, le=64, description="target crops per photo, at most")

    min_sharpness: float = Field(30.0, ge=0, description="variance of the Laplacian at long side 640")
    min_texture: float = Field(0.05, ge=0, le=1, description="share of 16x16 blocks with detail")
    near_hash_bits: int = Field(12, ge=0, le=256, description="near duplicates differ in at most so many of 256 bits")
    near_score: float = Field(0.9, ge=0, le=1, description="and their embeddings at least this cosine")

    clip_model: str = Field(CLIP_MODEL, description="open_clip model name, or effnet-lite0 (small, ImageNet)")
    clip_pretrained: str = Field("", description="open_clip tag or local file; empty: the model's default")
    clip_config: str = Field("", description="folder of open_clip model JSONs")
    views: Literal[1, 7] = Field(7, description="embedded views per photo: whole, 2 end crops, 4 quadrants")
    candidates: int = Field(20, ge=1, le=1000, description="mined candidate references per photo")

    max_side: int = Field(800, ge=100, description="SIFT works at this long side")
    max_features: int = Field(2000, ge=100, description="strongest SIFT features kept per photo")
    min_consistent: int = Field(10, ge=4, description="inliers that agree in rotation and size: a pair is real")
    min_consistency: float = Field(0.7, ge=0, le=1, description="and their share of all inliers")
    high_overlap: float = Field(0.30, ge=0, le=1, description="Rolp above this, and")
    high_scale: float = Field(0.90, ge=0, le=1, description="Rs above this: High")
    medium_overlap: float = Field(0.10, ge=0, le=1, description="Rolp above this, and")
    medium_scale: float = Field(0.66, ge=0, le=1, description="Rs above this: Medium; every other verified pair is Low")
    duplicate_psnr: float = Field(30.0, gt=0, description="a reference crop this close to the target is a duplicate")

    min_crop_texture: float = Field(0.3, ge=0, le=1, description="share of a target crop's 16x16 blocks with detail")
    val_share: float = Field(0.05, ge=0, lt=1, description="share of groups in the validation split")
    test_share: float = Field(0.05, ge=0, le=1, description="share of groups in the test split")
    shard_samples: int = Field(500, ge=1, description="groups per tar, at most")

    @model_validator(mode="after")
    def _consistent(self) -> BuildConfig:
        if self.high + self.medium + self.low < 1:
            raise ValueError("high + medium + low must be at least 1: a group needs a reference")
        if self.val_share + self.test_share > 1:
            raise ValueError("val_share + test_share: more than 1")
        if self.high_overlap < self.medium_overlap or self.high_scale < self.medium_scale:
            raise ValueError("the High thresholds must not lie below the Medium ones")
        return self


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` texts as a dict; values are read as YAML scalars (so 3, 0.5, true and words work).

    What YAML can not read, or reads as nothing, is the text itself: an empty value is one, and the recipe refuses a
    mistyped one by its key.
    """
    values = {}
    for text in settings:
        key, mark, value = text.partition("=")
        if not mark or not key.strip():
            raise LmrError(f"--set {text}: write it as KEY=VALUE")
        try:
            read = yaml.safe_load(value)
        except (yaml.YAMLError, RecursionError):
            read = None
        values[key.strip()] = value.strip() if read is None else read
    return values


def part_of(recipe: BaseModel, part: type[Part]) -> Part:
    """The settings of one stage: the fields of its dataclass, taken from the recipe by name."""
    fields = dataclasses.fields(part)  # type: ignore[arg-type]
    return part(**{field.name: getattr(recipe, field.name) for field in fields})


def load_recipe(
    recipe_type: type[Recipe], path: Path | None, overrides: Mapping[str, Any], preset: Mapping[str, Any] | None = None
) -> Recipe:
    """A validated recipe: the preset's keys, the file's (TOML or YAML; none without a path), then `overrides` that are
    not None."""
    values = {**(preset or {}), **(_read(path) if path else {})}
    over = {key: value for key, value in overrides.items() if value is not None}
    values.update(over)
    for key, value in values.items():
        field = recipe_type.model_fields.get(key)
        if isinstance(value, bool) and field and field.annotation is not bool:  # pydantic would count yes as 1
            origin = "options" if key in over else str(path)
            raise LmrError(f"{origin}: {key}: true and false (in YAML also yes, no, on, off) are no value of this key")
    try:
        return recipe_type.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        origin = str(path) if path and not (first["loc"] and first["loc"][0] in over) else "options"
        if first["type"] == "extra_forbidden":
            known = ", ".join(sorted(recipe_type.model_fields))
            raise LmrError(f"{origin}: unknown key {key!r}; known keys: {known}") from None
        text = first["msg"].removeprefix("Value error, ")
        given = f" (given: {first['input']!r})" if key else ""
        raise LmrError(f"{origin}: {key + ': ' if key else ''}{text}{given}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        toml = path.suffix.lower() == ".toml"
        values = tomllib.loads(text) if toml else yaml.safe_load(text)
        twice = None if toml else _twice(text)
    except FileNotFoundError:
        raise LmrError(f"{path}: no such recipe file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, yaml.YAMLError, RecursionError) as error:
        raise LmrError(f"{path}: not a readable recipe ({' '.join(str(error).split())[:160]})") from None
    if twice is not None:
        raise LmrError(f"{path}: the key {twice!r} stands there twice; keep one of them")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise LmrError(f"{path}: a recipe is a table of keys and values")
    return {str(key): value for key, value in values.items()}


def _twice(text: str) -> str | None:
    """The first key of a YAML table that stands there twice: its loader takes the last (TOML's refuses)."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    keys = [str(key.value) for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    return next((key for key in keys if keys.count(key) > 1), None)
