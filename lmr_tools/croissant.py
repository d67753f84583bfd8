"""croissant.json: the machine-readable description of a dataset's files (MLCommons Croissant 1.1).

Format: http://mlcommons.org/croissant/1.1; checked with the `mlcroissant` package.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

TABLES = {
    "images": "One row per photo that was found, with its hash, quality scores and status (used, unused, rejected).",
    "rejects": "One row per rejected photo: the stage, the reason, the numbers behind it.",
    "embeddings": "Unit vectors of the photos, float16; view 0 is the whole photo, the others are crops of it.",
    "candidates": "The photos mined for each photo by embedding, most similar first (rank 0).",
    "pairs": "Geometry of each directed pair: overlap, scale ratio, inliers, tier (null: not usable) and the reason.",
    "groups": "One row per reference of each group: photos, crop corners in source pixels, slot, tier, scores.",
    "shards": "One row per tar file: samples, bytes, sha256.",
    "samples": "One row per group: the byte range of its shard that holds it, and the sha256 of that range.",
}
DATA_TYPES = (
    (pa.types.is_integer, "sc:Integer"),
    (pa.types.is_floating, "sc:Float"),
    (pa.types.is_boolean, "sc:Boolean"),
)
CROISSANT = "http://mlcommons.org/croissant/"
# The terms of Croissant 1.1, as its specification binds them.
CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": CROISSANT,
    "rai": f"{CROISSANT}RAI/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "name": {"@container": "@language"},
    "description": {"@container": "@language"},
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
} | {
    term: f"cr:{term}"
    for term in (
        *("arrayShape", "citeAs", "column", "containedIn", "equivalentProperty", "extract", "field", "fileProperty"),
        *("fileObject", "fileSet", "format", "includes", "isArray", "isLiveDataset", "jsonPath", "key", "md5"),
        *("parentField", "path", "recordSet", "references", "regex", "repeated", "replace", "samplingRate"),
        *("separator", "source", "subField", "transform"),
    )
}
LICENCE = (
    "The crops are parts of photos that keep their owners' copyrights and licences; this toolkit does not know them. "
    "Whoever shares this dataset must hold the rights to the photos."
)


def croissant(manifest: Mapping[str, Any], schemas: Mapping[str, pa.Schema]) -> dict[str, Any]:
    """The Croissant description: a FileObject per table with its sha256, a FileSet of the shards, all columns."""
    files: list[dict[str, Any]] = [
        {
            "@type": "cr:FileObject",
            "@id": f"tables/{name}.parquet",
            "name": f"{name}.parquet",
            "description": TABLES.get(name, name),
            "contentUrl": f"tables/{name}.parquet",
            "encodingFormat": "application/x-parquet",
            "sha256": manifest["tables"][name]["sha256"],
        }
        for name in schemas
    ]
    shards = {
        "@type": "cr:FileSet",
        "@id": "shard-files",
        "name": "shard-files",
        "description": "WebDataset tars: ID.target.png, ID.ref0.png ..., ID.json. The shards table holds their sha256.",
        "encodingFormat": "application/x-tar",
        "includes": "shards/*.tar",
    }
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": f"{CROISSANT}1.1",
        "name": "multi-reference-super-resolution-groups",
        "description": "Target crops with reference crops of High, Medium and Low similarity, of the same places.",
        "license": LICENCE,
        "version": f"{manifest['version']}.0.0",
        "distribution": [*files, shards],
        "recordSet": [_record_set(name, schema) for name, schema in schemas.items()],
    }


def _record_set(table: str, schema: pa.Schema) -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": table,
        "name": table,
        "description": TABLES.get(table, table),
        "field": [_field(table, column) for column in schema],
    }


def _field(table: str, column: pa.Field) -> dict[str, Any]:
    listed = pa.types.is_fixed_size_list(column.type)
    kind = column.type.value_type if listed else column.type
    field: dict[str, Any] = {
        "@type": "cr:Field",
        "@id": f"{table}/{column.name}",
        "name": column.name,
        "dataType": next((name for fits, name in DATA_TYPES if fits(kind)), "sc:Text"),
        "source": {"fileObject": {"@id": f"tables/{table}.parquet"}, "extract": {"column": column.name}},
    }
    if listed:
        field |= {"isArray": True, "arrayShape": str(column.type.list_size)}
    # Every table but images itself names photos by their id there.
    if column.name in ("image_id", "target_image", "ref_image") and table != "images":
        field["references"] = {"field": {"@id": "images/image_id"}}
    return field
