"""Exact and near duplicates and poor photos: who has to leave the flow, each with its reason.

Every function takes rows and returns the rejects among them; one photo of a set of duplicates stays and is named in the
`detail` of the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lmr_tools.schema import ImageRow, RejectRow


def reject(row: ImageRow, stage: str, reason: str, detail: str) -> RejectRow:
    """The `rejects` row of a photo."""
    return RejectRow(image_id=row.image_id, path=row.path, stage=stage, reason=reason, detail=detail)


def staying(rows: Sequence[ImageRow], gone: Iterable[RejectRow]) -> list[ImageRow]:
    """The rows that no reject names, in order."""
    names = {row.image_id for row in gone}
    return [row for row in rows if row.image_id not in names]


def exact_duplicates(rows: Sequence[ImageRow]) -> list[RejectRow]:
    """All but the first of the photos with equal bytes (the order of `rows` decides)."""
    first: dict[str, ImageRow] = {}
    rejects = []
    for row in rows:
        survivor = first.setdefault(row.sha256, row)
        if survivor is not row:
            rejects.append(reject(row, "dedup", "exact duplicate", f"of {survivor.image_id} ({survivor.path})"))
    return rejects


def poor_photos(
    rows: Iterable[ImageRow], *, min_side: int, min_sharpness: float, min_texture: float
) -> list[RejectRow]:
    """Photos that are too small for a crop, blurred or flat; the measured score stands in the reject."""
    rejects = []
    for row in rows:
        if min(row.width, row.height) < min_side:
            rejects.append(reject(row, "quality", "too small", f"{row.width}x{row.height}, a crop needs {min_side}"))
        elif row.texture < min_texture:  # first: a flat picture has no sharpness to speak of either
            rejects.append(reject(row, "quality", "flat", f"texture {row.texture:.3f} < {min_texture:g}"))
        elif row.sharpness < min_sharpness:
            rejects.append(reject(row, "quality", "blurred", f"sharpness {row.sharpness:.1f} < {min_sharpness:g}"))
    return rejects


def hash_distance(a: ImageRow, b: ImageRow) -> int:
    """Number of differing bits of two perceptual hashes (0 to 256)."""
    return (int(a.phash, 16) ^ int(b.phash, 16)).bit_count()


def near_duplicates(
    rows: Sequence[ImageRow], similar: Iterable[tuple[int, int, float]], *, max_bits: int
) -> list[RejectRow]:
    """Photos that repeat another: `similar` gives (row number, row number, cosine) to be checked by hash.

    Photos are taken largest first (then most bytes: least compressed, then smallest id) and stay unless they repeat one
    that stayed, so a chain of small changes does not wipe out its far end.
    """
    neighbours: dict[int, list[tuple[int, int, float]]] = {}
    for a, b, score in similar:
        bits = hash_distance(rows[a], rows[b])
        if a != b and bits <= max_bits:
            neighbours.setdefault(a, []).append((b, bits, score))
            neighbours.setdefault(b, []).append((a, bits, score))

    def preference(number: int) -> tuple[int, int, str]:
        row = rows[number]
        return -row.width * row.height, -row.bytes, row.image_id

    dropped: dict[int, RejectRow] = {}
    for number in sorted(neighbours, key=preference):
        if number in dropped:
            continue
        for other, bits, score in neighbours[number]:
            if other not in dropped and preference(other) > preference(number):
                detail = f"of {rows[number].image_id} ({rows[number].path}): {bits} of 256 bits, embedding {score:.3f}"
                dropped[other] = reject(rows[other], "dedup", "near duplicate", detail)
    return [dropped[number] for number in sorted(dropped)]
