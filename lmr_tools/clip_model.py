"""Finding and loading the image tower of an open_clip model: names, tags, files -> a network and its preprocessing.

Weights that are not here are got by `weight_fetch`; their names stand in `weights`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmr_tools.schema import LmrError
from lmr_tools.weight_fetch import clip_tag_file, fetch
from lmr_tools.weights import CLIP_MODEL, CLIP_PRETRAINED, EFFNET

if TYPE_CHECKING:
    from torch import nn

PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")


@dataclass(frozen=True, kw_only=True)
class ImageTower:
    """`visual` maps normalised pixels (B, 3, size, size) to features (B, dimension); it is in eval mode, on the CPU."""

    name: str
    visual: nn.Module
    dimension: int
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    quick_gelu: bool  # the weights were trained with this activation in place of GELU


def load_image_tower(model: str, pretrained: str | None, config_dir: Path | None) -> ImageTower:
    """The image tower of open_clip model `model` with the weights `pretrained` (a tag or a local file).

    Without `pretrained`, ViT-B-32 gets the tag laion2b_s34b_b79k and `effnet-lite0` its own file, fetched if missing.
    Raises LmrError for an unknown model, tag or folder, and for weights that are missing, damaged or of another model.
    """
    import open_clip
    import torch

    if model == EFFNET and pretrained is None and config_dir is None:
        file = fetch(EFFNET)
        pretrained, config_dir = str(file), file.parent
    if config_dir is not None:
        add_model_configs(config_dir)
    if model not in open_clip.list_models():
        raise LmrError(
            f"--clip-model {model}: open_clip knows no such model; name one of its models, or give the folder of its "
            f"JSON file with --clip-config, or use --clip-model {EFFNET}"
        )
    file, tag = _weights_file(model, pretrained)
    settings = {key: tag[key] for key in PREPROCESSING if tag.get(key) is not None}
    try:
        network = open_clip.create_model(
            model,
            pretrained=str(file),
            force_quick_gelu=bool(tag.get("quick_gelu")),
            force_preprocess_cfg=settings,
            weights_only=True,
        )
        preprocessing = open_clip.get_model_preprocess_cfg(network)
        visual = network.visual.eval().requires_grad_(False)
        size = preprocessing["size"]
        height, width = (size, size) if isinstance(size, int) else size
        with torch.inference_mode():
            features = visual(torch.zeros(1, 3, height, width))
    except Exception as error:  # torch, safetensors, timm and open_clip raise whatever they like on a wrong file
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise LmrError(
            f"{file}: these weights do not load into {model} ({reason}); give others with --clip-pretrained FILE, or "
            f"another model with --clip-model"
        ) from None
    if height != width or not isinstance(features, torch.Tensor) or features.ndim != 2:
        raise LmrError(f"--clip-model {model}: its image tower does not map a square picture to one vector")
    return ImageTower(
        name=f"{model}/{pretrained or CLIP_PRETRAINED}" if tag else f"{model}/{file.name}",
        visual=visual,
        dimension=features.shape[1],
        size=height,
        mean=tuple(preprocessing["mean"]),
        std=tuple(preprocessing["std"]),
        interpolation=preprocessing["interpolation"],
        quick_gelu=bool(tag.get("quick_gelu")),
    )


def add_model_configs(folder: Path) -> None:
    """Make open_clip know the models that the JSON files in `folder` describe."""
    import json

    import open_clip

    if not folder.is_dir() or not list(folder.glob("*.json")):
        raise LmrError(f"--clip-config {folder}: not a folder with open_clip model configurations (*.json)")
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise LmrError(f"--clip-config: {path} is not a readable JSON file ({error})") from None
    open_clip.add_model_config(folder)


def _weights_file(model: str, pretrained: str | None) -> tuple[Path, dict[str, Any]]:
    """The file to load, and open_clip's settings for it when `pretrained` is a tag (else none)."""
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained is None:
        if model != CLIP_MODEL:
            known = f"a tag ({', '.join(tags)}) or a file" if tags else "a file"
            raise LmrError(f"--clip-model {model}: give its weights with --clip-pretrained: {known}")
        pretrained = CLIP_PRETRAINED
    if open_clip.is_pretrained_cfg(model, pretrained):
        return clip_tag_file(model, pretrained), open_clip.get_pretrained_cfg(model, pretrained)
    file = Path(pretrained).expanduser()
    if not file.is_file():
        known = f"and not a tag of {model} ({', '.join(tags)})" if tags else f"and {model} has no tags"
        raise LmrError(f"--clip-pretrained {pretrained}: no such file, {known}")
    if file.suffix in (".npz", ".npy"):
        raise LmrError(f"--clip-pretrained {pretrained}: numpy files are not read; give safetensors or a PyTorch file")
    return file, {}
