"""Training recipes: which key wins, what is refused, what a run that goes on may change."""

import math
from pathlib import Path

import pytest

from lmr_tools.schema import LmrError
from mrefsr.recipes import FREE, PRESETS, TrainConfig, changed_keys, refuse_changes, train_config
from mrefsr.training_state import model_config, rate_factor

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_options_lie_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text("crop = 64\nsteps = 70\n")
    config = train_config("tiny", recipe, {"steps": 90, "batch": None})
    assert (config.crop, config.steps, config.batch) == (64, 90, PRESETS["tiny"]["batch"])


def test_the_published_recipe() -> None:
    config = train_config("mrefsr-rec", None, {})
    assert (config.crop, config.batch, config.steps, config.lr, config.betas) == (160, 48, 255_000, 1e-4, (0.9, 0.999))
    assert [round(config.lr * share, 12) for share in config.offset_lr] == [1e-6, 1e-5, 1e-4]
    assert rate_factor(config, 1) == rate_factor(config, 255_000) == 1
    assert config.adversarial_from > config.steps
    gan = train_config("mrefsr-gan", None, {})
    assert (gan.l1, gan.perceptual, gan.adversarial, gan.gradient_penalty) == (1, 1e-4, 1e-6, 10)
    assert (gan.critic_lr, gan.adversarial_from) == (1e-4, 10_001)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ({"lerning_rate": 1}, "unknown key 'lerning_rate'; known keys: accumulate"),
        ({"crop": 30}, "crop: Input should be a multiple of 4 (given: 30)"),
        ({"batch": 5, "accumulate": 2}, "batch 5 does not split into 2 equal passes"),
        ({"min_references": 4}, "min_references must not be above"),
        ({"warmup": 5000}, "warmup 5000 must be below steps 1000"),
        ({"l1": 0}, "nothing would be learnt"),
        ({"precision": "fp8"}, "precision: Input should be 'fp32', 'bf16' or 'fp16'"),
    ],
)
def test_wrong_values_are_named(overrides: dict[str, object], text: str) -> None:
    with pytest.raises(LmrError) as error:
        train_config("tiny", None, {"steps": 1000, **overrides})
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_a_run_goes_on_with_keys_changed_that_decide_nothing() -> None:
    began = train_config("mrefsr-rec", None, {}).model_dump(mode="json")
    other = {"workers": 7, "log_every": 3, "keep": 9, "recompute": True}
    assert set(other) <= FREE
    assert changed_keys(began, train_config("mrefsr-rec", None, {**other, "steps": 300_000})) == []
    assert changed_keys(began, train_config("mrefsr-rec", None, {"lr": 1e-3, "crop": 64})) == ["crop", "lr"]
    with pytest.raises(LmrError, match=r"another recipe \(lr was 0.0001 and is 0.001\)"):
        refuse_changes(Path("run"), began, train_config("mrefsr-rec", None, {"lr": 1e-3}))


def test_the_length_of_a_cosine_is_part_of_the_recipe() -> None:
    began = train_config("tiny", None, {"steps": 1000}).model_dump(mode="json")
    assert changed_keys(began, train_config("tiny", None, {"steps": 1001})) == ["steps"]


def test_learning_rate_rises_and_falls() -> None:
    config = TrainConfig(steps=110, warmup=10, schedule="cosine", final_lr=0.1)
    assert [rate_factor(config, step) for step in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1])
    assert rate_factor(config, 60) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)
    assert rate_factor(config, 110) == pytest.approx(0.1)
    rates = [rate_factor(config, step) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


def test_the_backbone_that_a_network_has_anyway_is_no_change() -> None:
    assert train_config("tiny", None, {"backbone": "vgg16"}) == train_config("tiny", None, {})
    assert model_config(train_config("mrefsr-rec", None, {"backbone": "vgg16"})).backbone == "vgg16"


def test_the_training_page_lists_every_key_with_its_default() -> None:
    page = (DOCS / "training.md").read_text()
    for key, field in TrainConfig.model_fields.items():
        value = list(field.default) if isinstance(field.default, tuple) else field.default
        assert f"| `{key}` | `{value}` | {field.description}" in page, key
