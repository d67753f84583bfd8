"""The card and the Croissant file say what the tables hold, nothing of the machine, and the same for equal datasets."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from lmr_tools.card import plain
from lmr_tools.tables import sha256_file
from tests.lmr_tools.dataset_fixture import make_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("card"))


def facts(dataset: Path) -> dict:
    return json.loads((dataset / "dataset.json").read_text())


def test_front_matter_is_what_the_hub_reads(dataset: Path) -> None:
    _, front, body = (dataset / "README.md").read_text().split("---\n", 2)
    meta = yaml.safe_load(front)
    assert (meta["license"], meta["license_name"]) == ("other", "unknown")
    assert meta["size_categories"] == ["n<1K"]
    files = meta["configs"][0]["data_files"]
    assert [entry["split"] for entry in files] == ["train", "validation", "test"]
    found = {path.name for entry in files for path in dataset.glob(entry["path"])}
    assert found == {path.name for path in (dataset / "shards").iterdir()}
    assert "keep their owners' copyrights" in body


def test_numbers_and_thresholds_are_those_of_the_dataset(dataset: Path) -> None:
    text = (dataset / "README.md").read_text()
    for expected in (
        "| train | 4 | 3 | 2 |",
        "| val | 2 | 1 | 1 |",
        "Photos found: 36; used: 30; good but in no group: 5; rejected: 1.",
        "| scan: not an image | 1 |",
        "| `tables/pairs.parquet` | 180 |",
        "| High | > 0.3 | > 0.9 |",
        "| Medium | > 0.1 | > 0.66 |",
        "Embedded with stub (8 numbers); `clip_score` is the cosine of two such embeddings",
        "measured recall 1.0000",
        'WebDataset("shards/train-{000000..000001}.tar"',
        "0 of 35 references are not tied",
    ):
        assert expected in text


def test_equal_datasets_have_equal_cards_without_paths(dataset: Path, tmp_path: Path) -> None:
    other = make_dataset(tmp_path / "elsewhere")
    for name in ("README.md", "croissant.json"):
        assert (other / name).read_bytes() == (dataset / name).read_bytes()
        assert str(tmp_path) not in (other / name).read_text()
        assert str(dataset.parent) not in (dataset / name).read_text()


def test_croissant_describes_every_table(dataset: Path) -> None:
    description = json.loads((dataset / "croissant.json").read_text())
    assert description["conformsTo"] == "http://mlcommons.org/croissant/1.1"
    files = {entry["@id"]: entry for entry in description["distribution"]}
    sets = {entry["@id"]: entry for entry in description["recordSet"]}
    assert len(files.keys() | sets.keys()) == len(files) + len(sets), "ids must be unique in the whole file"
    for path in (dataset / "tables").glob("*.parquet"):
        entry = files.pop(f"tables/{path.name}")
        assert entry["sha256"] == sha256_file(path)
        assert (dataset / entry["contentUrl"]).is_file()
        fields = sets.pop(path.stem)["field"]
        assert [field["source"]["extract"]["column"] for field in fields] == pq.read_schema(path).names
        for field in fields:
            assert field["source"]["fileObject"]["@id"] == f"tables/{path.name}"
    assert list(files) == ["shard-files"] and not sets
    assert {p.name for p in dataset.glob(files["shard-files"]["includes"])} == {
        p.name for p in (dataset / "shards").iterdir()
    }


def test_croissant_types_follow_the_columns(dataset: Path) -> None:
    description = json.loads((dataset / "croissant.json").read_text())
    fields = {field["@id"]: field for records in description["recordSet"] for field in records["field"]}
    assert fields["images/width"]["dataType"] == "sc:Integer"
    assert fields["groups/overlap"]["dataType"] == "sc:Float"
    assert fields["groups/slot"]["dataType"] == "sc:Text"
    vector = fields["embeddings/vector"]
    assert (vector["dataType"], vector["isArray"], vector["arrayShape"]) == ("sc:Float", True, "8")
    assert fields["groups/ref_image"]["references"] == {"field": {"@id": "images/image_id"}}
    assert "references" not in fields["images/image_id"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a|b\n# c", "a&#124;b # c"),
        ("<script>", "&#60;script&#62;"),
        ("[x](y)`", "&#91;x&#93;(y)&#96;"),
        ("/home/me/w.pt", "w.pt"),
        ("~/w.pt", "w.pt"),
        ("../w.pt", "w.pt"),
        ("C:\\me\\w.pt", "w.pt"),
        ("laion2b_s34b", "laion2b&#95;s34b"),
    ],
)
def test_plain_text_can_not_break_out(text: str, expected: str) -> None:
    assert plain(text) == expected
