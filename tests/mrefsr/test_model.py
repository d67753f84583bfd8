"""The model against a plain float64 oracle, and what must hold for any weights: masks, order, sizes, tiles."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lmr_tools.schema import LmrError
from mrefsr.config import MODEL_PRESETS, ModelConfig
from mrefsr.fusion import bands
from mrefsr.model import MatchedReference, MRefSR, ReferenceFeatures
from mrefsr.parameters import initialise, parameter_groups
from tests.mrefsr import plain_mrefsr

TINY = MODEL_PRESETS["mrefsr-tiny"]
# The published structure (groups, value width, no reduction, bilinear base), narrow and shallow.
NARROW = ModelConfig(channels=8, content_blocks=1, blocks=(1, 1, 1), offset_groups=8)
SMALL = dataclasses.replace(NARROW, reference_channels=(32, 16, 8))
CONFIGS = {"tiny": TINY, "small": SMALL}


def random_model(config: ModelConfig, seed: int = 0) -> MRefSR:
    """A stand-in: random weights that move offsets by about a pixel and make the attention uneven."""
    model = MRefSR(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1:
                gain = 8.0 if "conv_emb" in name else 0.3 if "body" in name else 1.0
                value.normal_(0, gain / value[0].numel() ** 0.5, generator=generator)
            elif value.shape == (1,):
                value.fill_(0.2)
            else:
                value.normal_(0, 0.1, generator=generator)
    return model.eval()


def picture(height: int, width: int, seed: int) -> Tensor:
    """3HW in [0, 1] with coarse and fine detail."""
    generator = torch.Generator().manual_seed(seed)
    layers = [
        torch.nn.functional.interpolate(
            torch.rand(1, 3, max(height // step, 2), max(width // step, 2), generator=generator), (height, width)
        )
        for step in (1, 4, 9)
    ]
    return torch.stack(layers).mean(0)[0]


def case(
    height: int, width: int, sizes: Sequence[tuple[int, int]], seed: int = 0
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(LR, enlarged LR, references) of one item; LR size height x width, references of the given sizes."""
    target = picture(height * 4, width * 4, seed)[None]
    lr = torch.nn.functional.interpolate(target, (height, width), mode="bicubic", antialias=True)
    up = torch.nn.functional.interpolate(lr, scale_factor=4, mode="bicubic", antialias=True)
    return lr[0], up[0], [picture(*size, seed + 100 + i) for i, size in enumerate(sizes)]


@torch.no_grad()
def staged(model: MRefSR, lr: Tensor, up: Tensor, references: Sequence[Tensor]) -> Tensor:
    """One item with references of unequal sizes, as inference does it."""
    features = model.encode_input(up[None])
    matched = [model.match(features, model.encode_reference(reference[None]), up[None]) for reference in references]
    return model.restore(lr[None], matched).image[0]


def double_state(model: MRefSR, *, grad: bool = False) -> dict[str, Tensor]:
    return {k: v.detach().double().requires_grad_(grad) for k, v in model.state_dict().items()}


CASES = [
    (8, 8, []),
    (12, 9, [(48, 36)]),
    (10, 13, [(40, 52)] * 3),
    (7, 6, [(28, 24)] * 5),
    (3, 3, [(12, 12)] * 2),
    (9, 12, [(60, 44), (21, 83), (12, 12)]),  # references larger, smaller, wider than the input; not multiples of 4
]


@pytest.mark.parametrize(
    ("config", "height", "width", "sizes"),
    [(config, *sizes) for config in (TINY, SMALL) for sizes in CASES] + [(NARROW, *CASES[2])],
)
def test_agrees_with_the_oracle(config: ModelConfig, height: int, width: int, sizes: list[tuple[int, int]]) -> None:
    model = random_model(config)
    lr, up, references = case(height, width, sizes)
    with torch.no_grad():
        expected = plain_mrefsr.restore(
            double_state(model), model.config, lr.double(), up.double(), [r.double() for r in references]
        )
    got = staged(model, lr, up, references)
    torch.testing.assert_close(got.double(), expected, atol=2e-4, rtol=1e-4)
    if references and len(set(sizes)) == 1:
        with torch.no_grad():
            torch.testing.assert_close(model(lr[None], up[None], torch.stack(references)[None])[0], got)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_agree_with_the_oracle(name: str) -> None:
    model = random_model(CONFIGS[name], seed=1).train()
    lr, up, references = case(7, 6, [(28, 24)] * 3)
    weight = torch.randn(3, 28, 24, generator=torch.Generator().manual_seed(5))
    state = double_state(model, grad=True)
    names = [k for k, _ in model.network.named_parameters()]
    doubles = [r.double() for r in references]
    expected_image = plain_mrefsr.restore(state, model.config, lr.double(), up.double(), doubles)
    expected = torch.autograd.grad((expected_image * weight).sum(), [state["network." + k] for k in names])
    image = model(lr[None], up[None], torch.stack(references)[None])
    got = torch.autograd.grad((image[0] * weight).sum(), list(model.network.parameters()))
    for key, mine, theirs in zip(names, got, expected, strict=True):
        assert theirs.norm() > 0, key
        assert (mine.double() - theirs).norm() <= 1e-3 * theirs.norm(), key


def batch(model_seed: int, present: list[list[bool]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    items = [case(9, 8, [(36, 32)] * len(row), seed=model_seed + 10 * i) for i, row in enumerate(present)]
    lr, up = torch.stack([i[0] for i in items]), torch.stack([i[1] for i in items])
    return lr, up, torch.stack([torch.stack(i[2]) for i in items]), torch.tensor(present)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_masked_reference_has_no_influence(name: str) -> None:
    model = random_model(CONFIGS[name])
    present = [[True, False, True], [True, True, True], [False, False, False], [False, True, False]]
    lr, up, references, mask = batch(3, present)
    references[~mask] = torch.nan
    together = model(lr, up, references, mask)
    for i, row in enumerate(mask):
        alone = model(lr[i : i + 1], up[i : i + 1], references[i : i + 1, row])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)
    # Exactly none: other pixels under the mask, bit-identical picture and gradients.
    grads = torch.autograd.grad(together.square().sum(), list(model.network.parameters()))
    references[~mask] = 0.5
    again = model(lr, up, references, mask)
    assert torch.equal(together, again)
    grads_again = torch.autograd.grad(again.square().sum(), list(model.network.parameters()))
    assert all(torch.equal(a, b) and bool(a.isfinite().all()) for a, b in zip(grads, grads_again, strict=True))


@torch.no_grad()
def test_order_of_references_does_not_matter() -> None:
    model = random_model(SMALL)
    lr, up, references, _ = batch(4, [[True] * 5] * 2)
    expected = model(lr, up, references)
    for order in ([4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        torch.testing.assert_close(model(lr, up, references[:, order]), expected, atol=1e-5, rtol=1e-5)
    assert (model(lr, up, references[:, :4]) - expected).abs().max() > 1e-3


def test_without_references_the_picture_is_base_plus_content() -> None:
    model = MRefSR(TINY).eval()
    initialise(model.network, TINY, torch.Generator().manual_seed(0))
    lr, up, references, _ = batch(5, [[True, True]])
    none = torch.zeros(1, 2, dtype=torch.bool)
    with torch.no_grad():
        empty = model(lr, up, references[:, :0])
        assert torch.equal(empty, model(lr, up, references, none))
        # Kaiming's start has a zero last layer: the untrained model returns the enlarged LR itself.
        torch.testing.assert_close(empty, up, atol=1e-6, rtol=0)
        torch.testing.assert_close(model(lr, up, references), up, atol=1e-6, rtol=0)
    loss = model(lr, up, references, none).square().sum()
    gradients = torch.autograd.grad(loss, [*model.network.parameters()], allow_unused=True)
    assert all(g is None or bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_matching_exact(dtype: torch.dtype) -> None:
    model = random_model(SMALL)
    lr, up, references = case(10, 9, [(40, 36), (36, 44)])

    def matched() -> list[MatchedReference]:
        return [model.match(model.encode_input(up[None]), model.encode_reference(r[None])) for r in references]

    with torch.no_grad():
        exact = matched()
        full = model.restore(lr[None], exact).image
        with torch.autocast("cpu", dtype):
            coarse = matched()
            assert all(torch.equal(a.taps, b.taps) for a, b in zip(coarse, exact, strict=True))
            image = model.restore(lr[None], coarse).image
    assert bool(image.isfinite().all())
    assert (image.float() - full).abs().mean() < 0.1 * full.std()
    with torch.autocast("cpu", dtype):  # and it trains
        gradients = torch.autograd.grad(model.restore(lr[None], coarse).image.sum(), [*model.network.parameters()])
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


@torch.no_grad()
def test_attention_shares_sum_to_one() -> None:
    model = random_model(SMALL)
    lr, up, references, _ = batch(6, [[True, True, True]])
    features = model.encode_input(up)
    matched = [model.match(features, model.encode_reference(references[:, n])) for n in range(3)]
    for scale, shares in zip((1, 2, 4), model.restore(lr, matched).attention, strict=True):
        assert shares.shape == (1, 3, 9 * scale, 8 * scale)
        torch.testing.assert_close(shares.sum(1), torch.ones(1, 9 * scale, 8 * scale))
        assert shares.std(1).mean() > 0.01
    assert [a.shape[1] for a in model.restore(lr, []).attention] == [0, 0, 0]


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_bands_of_rows_make_the_same_picture(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(CONFIGS[name])
    lr, up, references = case(14, 9, [(56, 36), (30, 60)])
    expected = staged(model, lr, up, references)
    monkeypatch.setattr("mrefsr.fusion.BAND_BYTES", 1)
    assert len(bands(14, 100)) == 4
    torch.testing.assert_close(staged(model, lr, up, references), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_recomputing_gives_the_same_gradients(name: str) -> None:
    model = random_model(CONFIGS[name])
    lr, up, references, mask = batch(8, [[True, False], [True, True]])
    parameters = list(model.network.parameters())
    kept, again = (
        torch.autograd.grad(model(lr, up, references, mask, recompute=recompute).square().sum(), parameters)
        for recompute in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def crop(reference: MatchedReference, rows: slice, columns: slice) -> MatchedReference:
    return dataclasses.replace(reference, taps=reference.taps[:, :, rows, columns])


@torch.no_grad()
def test_a_tile_equals_its_part_of_the_whole() -> None:
    model = random_model(SMALL)
    lr, up, references = case(44, 40, [(176, 160), (90, 200)])
    features = model.encode_input(up[None])
    matched = [model.match(features, model.encode_reference(reference[None])) for reference in references]
    whole = model.restore(lr[None], matched).image
    rows, columns = slice(4, 40), slice(8, 40)
    tile = [crop(m, rows, columns) for m in matched]
    part = model.restore(lr[None, :, rows, columns], tile, origin=(4, 8)).image
    # SMALL sees about 14 LR pixels around a pixel; the right side of the tile is the image's own.
    torch.testing.assert_close(part[:, :, 56:-56, 56:], whole[:, :, 72:-72, 88:], atol=1e-5, rtol=1e-5)


def test_frozen_parts_get_no_gradient() -> None:
    model = random_model(TINY).train()
    lr, up, references, _ = batch(7, [[True]])
    model(lr, up, references).sum().backward()
    assert all(p.grad is not None for p in model.network.parameters())
    frozen = [*model.extractor.parameters(), *model.transfer.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in frozen)


@pytest.mark.parametrize(
    ("lr", "up", "references", "mask", "message"),
    [
        ((1, 3, 2, 8), (1, 3, 8, 32), (1, 1, 3, 32, 32), None, "8x2 pixels is smaller than one 3x3 patch"),
        ((1, 1, 8, 8), (1, 3, 32, 32), (1, 1, 3, 32, 32), None, "not B,3,h,w"),
        ((1, 3, 8, 8), (1, 3, 30, 32), (1, 1, 3, 32, 32), None, "enlarged LR"),
        ((1, 3, 8, 8), (1, 3, 32, 32), (1, 1, 3, 11, 32), None, "at least 12 pixels"),
        ((1, 3, 8, 8), (1, 3, 32, 32), (1, 3, 32, 32), None, "not B,N,3,H,W"),
        ((2, 3, 8, 8), (2, 3, 32, 32), (1, 1, 3, 32, 32), None, "with B = 2"),
        ((1, 3, 8, 8), (1, 3, 32, 32), (1, 2, 3, 32, 32), (1, 1), "mask"),
    ],
)
def test_sizes_that_do_not_fit_are_named(
    lr: tuple[int, ...], up: tuple[int, ...], references: tuple[int, ...], mask: tuple[int, ...] | None, message: str
) -> None:
    given = None if mask is None else torch.ones(mask, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        MRefSR(NARROW)(torch.rand(lr), torch.rand(up), torch.rand(references), given)


def test_published_size() -> None:
    with torch.device("meta"):
        network = MRefSR(MODEL_PRESETS["mrefsr"]).network
        tiny = MRefSR(TINY).network
    assert len(network.state_dict()) == 350
    assert sum(p.numel() for p in network.parameters()) == 23_711_633
    assert sum(p.numel() for p in tiny.parameters()) == 159_299


def test_tensor_names_are_the_published_ones(shared: Path) -> None:
    with torch.device("meta"):
        model = MRefSR(MODEL_PRESETS["mrefsr"])
    for part, file in ((model.network, "keys_mrefsr"), (model.extractor, "keys_extractor")):
        published = json.loads((shared / "parity" / f"{file}.json").read_text())
        assert [[name, list(value.shape), "float32"] for name, value in part.state_dict().items()] == published


def test_learning_rate_groups_are_the_published_ones(shared: Path) -> None:
    published = json.loads((shared / "parity" / "optim_groups_mrefsr.json").read_text())
    with torch.device("meta"):
        network = MRefSR(MODEL_PRESETS["mrefsr"]).network
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = parameter_groups(network)
    assert [group["name"] for group in groups] == published["order"]
    for group in groups:
        assert group["lr"] == published["lr"][group["name"]]
        assert [names[id(p)] for p in group["params"]] == published["groups"][group["name"]]  # type: ignore[attr-defined]


def test_learning_rates_of_the_offset_layers_can_be_chosen() -> None:
    network = MRefSR(TINY).network
    groups = parameter_groups(network, lr=1e-3, offset_lr=dict.fromkeys(("small", "medium", "large"), 3e-4))
    assert [group["lr"] for group in groups] == [1e-3, 3e-4, 3e-4, 3e-4]
    params = [p for group in groups for p in group["params"]]  # type: ignore[attr-defined]
    assert len(params) == len(list(network.parameters()))


@pytest.mark.parametrize("name", CONFIGS)
def test_starting_values(name: str) -> None:
    config = CONFIGS[name]
    states = []
    for seed in (1, 1, 2):
        network = MRefSR(config).network
        before = torch.random.get_rng_state()
        initialise(network, config, torch.Generator().manual_seed(seed))
        assert torch.equal(torch.random.get_rng_state(), before)
        states.append(network.state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    first = "content_extractor.conv_first.weight"
    assert not torch.equal(states[0][first], states[2][first])
    for key, value in states[0].items():
        if key.endswith("bias") or "conv_offset_mask" in key:
            assert not value.any(), key
    weight = states[0]["dyn_agg_restore.body_small.0.conv1.weight"]
    deformable = states[0]["dyn_agg_restore.small_dyn_agg.weight"]
    if name == "small":
        torch.testing.assert_close(weight.std(), torch.tensor(0.02), atol=0.002, rtol=0)
        assert deformable.abs().max() <= 1 / (32 * 9) ** 0.5
        torch.testing.assert_close(deformable.std(), torch.tensor((3 * 32 * 9) ** -0.5), atol=0, rtol=0.05)
    else:
        torch.testing.assert_close(weight.std(), torch.tensor(0.5 * (2 / 1.01 / 144) ** 0.5), atol=0, rtol=0.05)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"chanels": 8}, "model.chanels: no such key"),
        ({"backbone": "vgg11"}, "model.backbone: 'vgg11' is none of vgg16, vgg19"),
        ({"blocks": [1, 2]}, "model.blocks: .* is not three numbers"),
        ({"channels": -4}, "model.channels: -4 is not a positive whole number"),
        ({"channels": 4.0}, "model.channels: 4.0 is not a positive whole number"),
        ({"channels": 7}, "model.channels: 7 is odd"),
        ({"feature_scale": [1.0, "a", 1.0]}, "model.feature_scale: 'a'"),
        ({"reference_channels": [16, 16, 12]}, "model.reference_channels: 12 do not split into 8"),
        ({"blur_references": "no"}, "model.blur_references: 'no'"),
    ],
)
def test_a_wrong_configuration_is_refused_by_name(values: dict[str, object], message: str) -> None:
    with pytest.raises(LmrError, match=message):
        ModelConfig.from_dict(values)


def test_a_configuration_survives_json() -> None:
    for config in MODEL_PRESETS.values():
        assert ModelConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_reference_features_hold_what_matching_and_transfer_need() -> None:
    model = random_model(TINY)
    features = model.encode_reference(picture(33, 50, 0)[None])
    assert isinstance(features, ReferenceFeatures)
    assert features.matching.shape == features.relu3_1.shape == (1, 256, 8, 12)
    assert features.relu2_1.shape == (1, 128, 16, 25)
    torch.testing.assert_close(features.matching.norm(dim=1), torch.ones(1, 8, 12))
    assert not features.matching.requires_grad
