"""Recipes: files and options, and what is said of a wrong one."""

from pathlib import Path

import pytest

from lmr_tools.config import BuildConfig, load_recipe, parse_settings
from lmr_tools.schema import LmrError


@pytest.mark.parametrize(("name", "text"), [("r.toml", "size = 128\nlow = 3\n"), ("r.yaml", "size: 128\nlow: 3\n")])
def test_options_lie_over_the_file(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    config = load_recipe(BuildConfig, tmp_path / name, {"low": 1, "high": None})
    assert (config.size, config.low, config.high) == (128, 1, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sise = 3", "unknown key 'sise'; known keys: "),
        ("size = 'big'", "size: "),
        ("size = 3", r"size: .*\(given: 3\)"),
        ("high = 0\nmedium = 0\nlow = 0", "a group needs a reference"),
        ("high_overlap = 0.05", "must not lie below"),
        ("test_share = 1.0", "val_share [+] test_share: more than 1"),
        ("size = ", "not a readable recipe"),
    ],
)
def test_a_wrong_recipe_is_one_line_that_names_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(LmrError, match=message) as caught:
        load_recipe(BuildConfig, path, {})
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("high: 1\nlow: 2\nhigh: 2\n", "the key 'high' stands there twice"),
        ("high: yes\n", "high: true and false"),
        ("val_share: off\n", "val_share: true and false"),
        ("views: yes\n", "views: true and false"),
    ],
)
def test_yaml_does_not_guess(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(LmrError, match=message) as caught:
        load_recipe(BuildConfig, path, {})
    assert str(caught.value).startswith(str(path))
    with pytest.raises(LmrError, match=r"^options: high: true"):
        load_recipe(BuildConfig, None, {"high": True})
    path.write_text("allow_partial: yes\n")
    assert load_recipe(BuildConfig, path, {}).allow_partial


def test_an_option_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text("size = 128")
    for over in ({"sise": 3}, {"size": "[1"}):
        with pytest.raises(LmrError, match=r"^options: "):
            load_recipe(BuildConfig, path, over)
    assert load_recipe(BuildConfig, path, {"clip_pretrained": ""}).clip_pretrained == ""


@pytest.mark.parametrize("name", ["r.toml", "r.yaml"])
def test_a_recipe_nested_without_end_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(("a = " if name.endswith("toml") else "a: ") + "[" * 20000)
    with pytest.raises(LmrError, match="not a readable recipe"):
        load_recipe(BuildConfig, path, {})


def test_settings_are_typed_and_a_recipe_can_not_change() -> None:
    assert parse_settings(["size=64", "strict_tiers=true", "clip_model=a/b"]) == {
        "size": 64, "strict_tiers": True, "clip_model": "a/b",
    }  # fmt: skip
    assert parse_settings(["clip_pretrained=", "size=[1", "clip_model=@home", "seed=null"]) == {
        "clip_pretrained": "", "size": "[1", "clip_model": "@home", "seed": "null",
    }  # fmt: skip
    with pytest.raises(LmrError, match="KEY=VALUE"):
        parse_settings(["size"])
    with pytest.raises(ValueError, match="frozen"):
        BuildConfig().size = 3
