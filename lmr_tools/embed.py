"""Photos -> unit vectors whose inner product tells how alike two views look: the `Embedder` protocol and open_clip's.

A photo is embedded as several views (whole, two end crops, four quadrants), so that a detail in one photo finds the
photo that shows only this detail. A vector depends on its photo alone: batches have one fixed shape (the last is
padded), and on the CPU each forward pass runs on one core, so neither neighbours, nor order, nor the number of cores
change a bit. That is also the fastest way there: several single-core passes side by side beat one pass on all cores.
The network comes from `clip_model`.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from PIL import Image as PilImage

from lmr_tools.schema import LmrError
from lmr_tools.tables import fingerprint

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    from lmr_tools.schema import Image

    Views = npt.NDArray[np.uint8]  # B, S, S, 3; RGB

Item = TypeVar("Item")
Result = TypeVar("Result")
# Anything that applies a picklable function to items and yields the results in order; the builtin `map` is one.
Mapper = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]

VIEWS = 7
VIEW_COUNTS = (1, 7)
VIEWS_VERSION = 2  # part of the cache key: raise it when `photo_views` changes
CPU_BATCH = 8  # views; small batches stay in the processor's cache and are the fastest there
GPU_BATCH = 448
# Pillow's filter names as open_clip spells them; "random" is a training augmentation that Pillow does not know.
FILTERS = {"bicubic": PilImage.Resampling.BICUBIC, "bilinear": PilImage.Resampling.BILINEAR}
REDUCING_GAP = 3.0  # from this ratio on Pillow box-filters first: hardly visible, several times faster on large photos


class Embedder(Protocol):
    """Turns views into vectors; tests use a stand-in."""

    @property
    def name(self) -> str:
        """What a manifest calls it."""

    @property
    def key(self) -> str:
        """Fingerprint of everything that a vector depends on: network, weights, preprocessing, views."""

    @property
    def dimension(self) -> int:
        """Length of a vector."""

    @property
    def size(self) -> int:
        """Side of a view in pixels."""

    @property
    def interpolation(self) -> str:
        """A key of `FILTERS`: how views are resized."""

    @property
    def views(self) -> int:
        """Views per photo, one of `VIEW_COUNTS`."""

    @property
    def batch_photos(self) -> int:
        """Photos per call of `embed`."""

    @property
    def parallel(self) -> int:
        """How many calls of `embed` may run at the same time, each in its own thread."""

    def embed(self, views_BSSC: Views) -> npt.NDArray[np.float32]:
        """(B, S, S, 3) -> unit vectors (B, dimension)."""


def photo_views(
    image: Image, *, views: int = VIEWS, size: int = 224, interpolation: str = "bicubic"
) -> npt.NDArray[np.uint8]:
    """RGB uint8 (H, W, 3) -> uint8 (views, size, size, 3).

    View 0 is the whole photo, squashed to a square. With 7 views follow the squares at both ends of the longer side and
    the four quadrants (row by row). Resizing is Pillow's antialiased filter, the one open_clip uses; with 7 views the
    photo is first squashed to twice the size, which is the quadrants, and the rest is made of that: half the time of
    seven crops of the photo, and no view ever has more pixels than it needs.
    """
    if views not in VIEW_COUNTS:
        raise ValueError(f"views must be one of {VIEW_COUNTS}, not {views}")
    resample = FILTERS[interpolation]
    picture = PilImage.fromarray(image)
    if views == 1:
        return np.array(picture.resize((size, size), resample, reducing_gap=REDUCING_GAP))[None]
    out = np.empty((views, size, size, 3), np.uint8)
    double = picture.resize((2 * size, 2 * size), resample, reducing_gap=REDUCING_GAP)
    out[0] = np.asarray(double.reduce(2))
    out[3:] = np.asarray(double).reshape(2, size, 2, size, 3).swapaxes(1, 2).reshape(4, size, size, 3)
    width, height = picture.size
    short, long = sorted(picture.size)
    if long <= 2 * short:
        # Both squares lie in one strip whose short side is `size`; squashing has left it pixels enough.
        side = round(size * long / short)
        halved = double.reduce((1, 2) if width > height else (2, 1))
        strip = np.asarray(halved.resize((side, size) if width > height else (size, side), resample))
        out[1], out[2] = strip[:size, :size], strip[-size:, -size:]
    else:
        for number, box in ((1, (0, 0, short, short)), (2, (width - short, height - short, width, height))):
            out[number] = np.asarray(picture.resize((size, size), resample, box, reducing_gap=REDUCING_GAP))
    return out


def enough_pixels(embedder: Embedder) -> int:
    """Shorter side from which on more pixels of a photo change its views hardly at all: twice what they have of it."""
    return 2 * embedder.size * (1 if embedder.views == 1 else 2)


def embed_photos(
    items: Iterable[tuple[str, Item]],
    load: Callable[[Item], Image],
    embedder: Embedder,
    *,
    mapper: Mapper = map,
) -> Iterator[tuple[str, npt.NDArray[np.float16] | LmrError]]:
    """Yield (id, vectors float16 (views, dimension)) for each (id, item), in order; an LmrError of `load` in its place.

    `load` and view making run through `mapper` (with processes: beside the forward pass), the forward pass in threads
    of this process. Only a few batches are in flight, so memory does not grow with the number of photos.
    """
    prepare = partial(
        _prepare, load=load, views=embedder.views, size=embedder.size, interpolation=embedder.interpolation
    )
    flying: deque[tuple[list[tuple[str, Any]], Future[npt.NDArray[np.float16]]]] = deque()
    with ThreadPoolExecutor(embedder.parallel, thread_name_prefix="embed") as pool:
        try:
            for batch in _batches(mapper(prepare, items), embedder.batch_photos):
                flying.append((batch, pool.submit(_embed_batch, embedder, batch)))
                if len(flying) > 2 * embedder.parallel:
                    yield from _paired(*flying.popleft())
            while flying:
                yield from _paired(*flying.popleft())
        finally:
            for _, future in flying:
                future.cancel()


def _prepare(
    entry: tuple[str, Item], *, load: Callable[[Item], Image], views: int, size: int, interpolation: str
) -> tuple[str, Views | LmrError]:
    name, item = entry
    try:
        return name, photo_views(load(item), views=views, size=size, interpolation=interpolation)
    except LmrError as error:
        return name, error


def _batches(prepared: Iterator[tuple[str, Any]], photos: int) -> Iterator[list[tuple[str, Any]]]:
    """Cut the stream after `photos` good photos; a long run of bad ones is cut too, so that it is not held back."""
    batch: list[tuple[str, Any]] = []
    good = 0
    for entry in prepared:
        batch.append(entry)
        good += not isinstance(entry[1], LmrError)
        if good == photos or len(batch) == 4 * photos:
            yield batch
            batch, good = [], 0
    if batch:
        yield batch


def _embed_batch(embedder: Embedder, batch: list[tuple[str, Any]]) -> npt.NDArray[np.float16]:
    """Vectors of the good photos of a batch, (photos, views, dimension)."""
    good = [views for _, views in batch if not isinstance(views, LmrError)]
    shape = (embedder.batch_photos, embedder.views, embedder.size, embedder.size, 3)
    if not good:
        return np.empty((0, embedder.views, embedder.dimension), np.float16)
    padded = np.zeros(shape, np.uint8)
    padded[: len(good)] = good
    vectors = embedder.embed(padded.reshape(-1, *shape[2:]))
    return vectors.astype(np.float16).reshape(*shape[:2], embedder.dimension)[: len(good)]


def _paired(
    batch: list[tuple[str, Any]], future: Future[npt.NDArray[np.float16]]
) -> Iterator[tuple[str, npt.NDArray[np.float16] | LmrError]]:
    vectors = iter(future.result())
    for name, views in batch:
        yield name, views if isinstance(views, LmrError) else next(vectors)


class OpenClipEmbedder:
    """The image tower of an open_clip model.

    `model_name` is one of open_clip's, or one that a JSON file in `config_dir` describes, or `effnet-lite0`, which is
    fetched on first use. `pretrained` is a tag of open_clip's or a local file (safetensors, or a PyTorch file read with
    `weights_only`). Raises LmrError that names the missing or unfit file and the way out.
    """

    def __init__(
        self,
        *,
        model_name: str = "ViT-B-32",
        pretrained: str | None = None,
        config_dir: Path | None = None,
        device: str = "auto",
        views: int = VIEWS,
    ) -> None:
        import torch

        from lmr_tools.clip_model import load_image_tower

        tower = load_image_tower(model_name, pretrained, config_dir)
        if views not in VIEW_COUNTS:
            raise LmrError(f"views: must be one of {VIEW_COUNTS}, not {views}")
        if tower.interpolation not in FILTERS:
            raise LmrError(f"{model_name}: resizes by {tower.interpolation!r}; known are {', '.join(FILTERS)}")
        self.device = _device(device)
        on_cpu = self.device.type == "cpu"
        self.name = tower.name
        self.dimension = tower.dimension
        self.size = tower.size
        self.interpolation = tower.interpolation
        self.views = views
        self.batch_photos = max(1, (CPU_BATCH if on_cpu else GPU_BATCH) // views)
        # One pass per core; on a GPU passes queue up anyway.
        self.parallel = torch.get_num_threads() if on_cpu else 1
        network = [model_name, tower.quick_gelu, _digest(tower.visual)]
        pixels = [tower.size, tower.interpolation, tower.mean, tower.std]
        self.key = fingerprint(network, pixels, views, VIEWS_VERSION)
        visual: Any = tower.visual  # torch's annotations know `memory_format` only without a device
        self._visual = visual.to(self.device, memory_format=torch.channels_last)
        self._mean = torch.tensor(tower.mean, device=self.device).repeat(self.size)
        self._std = torch.tensor(tower.std, device=self.device).repeat(self.size)

    def embed(self, views_BSSC: Views) -> npt.NDArray[np.float32]:
        """(B, S, S, 3) -> unit vectors (B, dimension). Bits are reproducible for batches of equal shape."""
        import torch

        with torch.inference_mode(), _one_core(self.device.type == "cpu"):
            features = self.features(self.pixels(views_BSSC)).float()
            vectors: npt.NDArray[np.float32] = torch.nn.functional.normalize(features, dim=-1).cpu().numpy()
        if not np.isfinite(vectors).all():
            raise LmrError(f"{self.name}: the network returns numbers that are not finite; the weights do not fit it")
        return vectors

    def pixels(self, views_BSSC: Views) -> torch.Tensor:
        """(B, S, S, 3) uint8 -> normalised float (B, 3, S, S) on the device."""
        import torch

        # Whole rows of pixels at a time: broadcasting over three channels would take ten times as long.
        rows = torch.from_numpy(views_BSSC).to(self.device).float().view(len(views_BSSC), self.size, self.size * 3)
        rows.div_(255).sub_(self._mean).div_(self._std)
        # HWC to BCHW by strides only: this is the channels-last layout that convolutions are fastest in.
        return rows.view(views_BSSC.shape).permute(0, 3, 1, 2)

    def features(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """The bare forward pass: normalised pixels (B, 3, S, S) -> features (B, dimension), not yet unit vectors."""
        features: torch.Tensor = self._visual(pixels_BCHW)
        return features


def _device(name: str) -> torch.device:
    """`auto`: cuda where there is one, else mps, else cpu. A device that is not there is an LmrError."""
    import torch

    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises both for a device that is not there
        reason = str(error).splitlines()[0][:120]
        raise LmrError(f"--device {name}: not usable here ({reason}); give auto, cpu, cuda, cuda:1 or mps") from None
    return device


class _one_core:
    """Context in which torch uses one core in this thread (torch keeps the count per thread)."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted

    def __enter__(self) -> None:
        import torch

        self.before = torch.get_num_threads()
        if self.wanted:
            torch.set_num_threads(1)

    def __exit__(self, *error: object) -> None:
        import torch

        if self.wanted:
            torch.set_num_threads(self.before)


def _digest(module: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
