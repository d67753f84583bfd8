"""Losses against torchvision's layers, hand-written formulas and finite differences."""

import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from lmr_tools.schema import LmrError
from mrefsr.discriminator import Discriminator
from mrefsr.features import vgg_layers
from mrefsr.losses import PerceptualLoss, adversarial_loss, critic_loss, gradient_penalty, reconstruction


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(batch: int = 2, size: tuple[int, int] = (36, 32), seed: int = 0) -> tuple[Tensor, Tensor]:
    gt = torch.rand(batch, 3, *size, generator=seeded(seed))
    return (gt + 0.1 * torch.randn(gt.shape, generator=seeded(seed + 1))).clamp(0, 1), gt


def perceptual(**options: Any) -> PerceptualLoss:
    """Random weights that keep the signal's size."""
    net = PerceptualLoss(weights=None, **options)
    generator = seeded(7)
    for parameter in net.parameters():
        deviation = (2 / parameter[0].numel()) ** 0.5 if parameter.ndim == 4 else 0.1
        parameter.data.normal_(0, deviation, generator=generator)
    return net


@pytest.mark.parametrize(("backbone", "letter", "last"), [("vgg16", "D", 26), ("vgg19", "E", 30)])
def test_features_and_file_are_torchvisions(backbone: Any, letter: str, last: int, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        layers = make_layers(cfgs[letter])[:last]
    path = tmp_path / "vgg.pth"
    torch.save({f"features.{name}": value for name, value in layers.state_dict().items()}, path)
    net = PerceptualLoss(backbone=backbone, weights=path, normalize=False)
    sr, gt = images()
    with torch.no_grad():
        difference = layers(sr.clone()) - layers(gt.clone())
        expected = sum(float(one.norm()) for one in difference) / 2
        assert float(net(sr, gt)) == pytest.approx(expected, rel=1e-4)
    assert isinstance(layers[-1], nn.ReLU)
    assert float(difference.abs().max()) > 0


def test_a_missing_vgg19_says_which_file_goes_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("LMR_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    with pytest.raises(LmrError, match=r"vgg19: .*put .*vgg19-dcbb9e9d\.pth into "):
        PerceptualLoss()


def test_a_file_without_the_deep_layers_is_refused(tmp_path: Path) -> None:
    layers = vgg_layers("vgg19", "conv3_1").values()
    state = {f"features.{place}.weight": torch.zeros(cout, cin, 3, 3) for place, cin, cout in layers}
    state |= {f"features.{place}.bias": torch.zeros(cout) for place, _, cout in layers}
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(LmrError, match=r"cut\.pth: holds no features\.12\.weight"):
        PerceptualLoss(weights=tmp_path / "cut.pth")


def test_the_norm_per_sample_does_not_depend_on_the_batch_size() -> None:
    sr, gt = images()
    of_sample, official = perceptual(), perceptual(norm="official")
    for net, growth in ((of_sample, 1.0), (official, 3**0.5)):
        once, thrice = float(net(sr, gt)), float(net(sr.repeat(3, 1, 1, 1), gt.repeat(3, 1, 1, 1)))
        assert thrice == pytest.approx(growth * once, rel=1e-5)
    one_by_one = [float(of_sample(sr[i : i + 1], gt[i : i + 1])) for i in range(2)]
    assert float(of_sample(sr, gt)) == pytest.approx(sum(one_by_one) / 2, rel=1e-5)
    assert float(official(sr, gt)) == pytest.approx(sum(x * x for x in one_by_one) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"norm": "official"}, {"distance": "l1", "style": True}])
def test_gradients_reach_the_restored_picture_alone(options: dict[str, Any]) -> None:
    net = perceptual(**options)
    sr, gt = images()
    sr.requires_grad_(), gt.requires_grad_()
    net(sr, gt).backward()
    assert sr.grad is not None and float(sr.grad.norm()) > 0
    assert gt.grad is None
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in net.parameters())


def test_the_perceptual_gradient_is_the_slope() -> None:
    # finite differences need float64, where the convolutions are torch's own
    net = perceptual(layers={"relu2_1": 0.5, "relu3_1": 0.25}).double()
    net._distance = lambda found, wanted: (found - wanted).flatten(1).norm(dim=1).mean()  # type: ignore[method-assign]
    sr, gt = (image.double() for image in images(1, (12, 12)))
    step = torch.randn(sr.shape, generator=seeded(5), dtype=torch.float64) * 1e-6
    sr.requires_grad_()
    (gradient,) = torch.autograd.grad(net(sr, gt), sr)
    with torch.no_grad():
        slope = (net(sr + step, gt) - net(sr - step, gt)) / 2
    assert float((gradient * step).sum()) == pytest.approx(float(slope), rel=1e-4)


def test_equal_pictures_have_zero_loss_and_a_finite_gradient() -> None:
    _, gt = images()
    for net in (perceptual(), perceptual(norm="official")):
        sr = gt.clone().requires_grad_()
        value = net(sr, gt)
        (gradient,) = torch.autograd.grad(value, sr)
        assert value.item() == 0
        assert bool((gradient == 0).all())


def test_options_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="norm 'batch' is none of sample, official"):
        PerceptualLoss(weights=None, norm="batch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no layer"):
        PerceptualLoss(weights=None, layers={"relu3_4": 1.0}, backbone="vgg16")
    with pytest.raises(ValueError, match="distance='l1'"):
        PerceptualLoss(weights=None, style=True)


def test_losses_are_float32_under_autocast() -> None:
    net, (sr, gt) = perceptual(), images()
    exact = float(net(sr, gt))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        halved = net(sr, gt)
        others = [
            reconstruction(sr.bfloat16(), gt),
            adversarial_loss(sr.bfloat16()),
            critic_loss(sr.bfloat16(), real=True),
            gradient_penalty(Discriminator(generator=seeded(0)), sr, gt, generator=seeded(1)),
        ]
    assert halved.dtype == torch.float32
    assert float(halved) == pytest.approx(exact, rel=0.05)
    assert all(value.dtype == torch.float32 for value in others)


def test_reconstruction_is_a_mean_weighted_or_not() -> None:
    sr, gt = images()
    weight = torch.rand(2, 1, 36, 32, generator=seeded(9))
    assert reconstruction(sr, gt).item() == pytest.approx((sr - gt).abs().mean().item())
    assert reconstruction(sr, gt, criterion="mse").item() == pytest.approx((sr - gt).square().mean().item())
    expected = ((sr - gt).abs() * weight).sum() / (3 * weight.sum())
    assert reconstruction(sr, gt, weight=weight).item() == pytest.approx(expected.item(), rel=1e-5)
    half = torch.zeros(2, 1, 36, 32)
    half[..., :16] = 1
    expected = (sr - gt)[..., :16].abs().mean()
    assert reconstruction(sr, gt, weight=half).item() == pytest.approx(expected.item(), rel=1e-5)


def test_each_side_pulls_the_scores_its_own_way() -> None:
    for kind in ("wgan", "vanilla", "lsgan", "hinge"):
        scores = torch.full((4, 1, 1, 1), 0.25, requires_grad=True)
        slopes = [
            torch.autograd.grad(value, scores)[0].sum().item()
            for value in (
                adversarial_loss(scores, kind=kind),  # type: ignore[arg-type]
                critic_loss(scores, real=True, kind=kind),  # type: ignore[arg-type]
                critic_loss(scores, real=False, kind=kind),  # type: ignore[arg-type]
            )
        ]
        assert slopes[0] < 0 and slopes[1] < 0 and slopes[2] > 0, kind


class Quadratic(nn.Module):
    """score = a sum(x^2) + b sum(x): its gradient 2 a x + b is known."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.02)), nn.Parameter(torch.tensor(0.01))

    def forward(self, x: Tensor) -> Tensor:
        return (self.a * x.square() + self.b * x).sum((1, 2, 3))[:, None, None, None]


def test_the_gradient_penalty_and_its_gradient_by_hand() -> None:
    critic, (sr, gt) = Quadratic(), images()
    alpha = torch.tensor([0.3, 0.85]).view(2, 1, 1, 1)
    value = gradient_penalty(critic, sr, gt, alpha=alpha, weight=10)
    x = (alpha * gt + (1 - alpha) * sr).flatten(1).double()
    a, b = critic.a.double().item(), critic.b.double().item()
    gradient = 2 * a * x + b
    norm = gradient.norm(dim=1)
    assert value.item() == pytest.approx(10 * (norm - 1).square().mean().item(), rel=1e-5)
    outer = 10 * 2 * (norm - 1) / 2 / norm
    by_a, by_b = torch.autograd.grad(value, (critic.a, critic.b))
    assert by_a.item() == pytest.approx((outer * (gradient * 2 * x).sum(1)).sum().item(), rel=1e-4)
    assert by_b.item() == pytest.approx((outer * gradient.sum(1)).sum().item(), rel=1e-4)


def test_the_penalty_of_the_clean_critic_against_finite_differences() -> None:
    critic = Discriminator(clean=True, generator=seeded(2)).double()
    sr, gt = images(2, (32, 32))
    alpha = torch.full((2, 1, 1, 1), 0.5)
    wide = lambda x: critic(x.double())  # noqa: E731
    value = gradient_penalty(wide, sr, gt, alpha=alpha)
    weight = critic.out_block[3].weight
    (gradient,) = torch.autograd.grad(value, weight)
    step = torch.zeros_like(weight)
    step[0, :20] = 1e-4
    with torch.no_grad():
        weight += step
    above = gradient_penalty(wide, sr, gt, alpha=alpha).item()
    with torch.no_grad():
        weight -= 2 * step
    below = gradient_penalty(wide, sr, gt, alpha=alpha).item()
    assert (gradient * step).sum().item() == pytest.approx((above - below) / 2, rel=1e-2)


def test_the_penalty_draws_alpha_from_its_generator_and_touches_no_picture() -> None:
    critic = Discriminator(clean=True, generator=seeded(2))
    sr, gt = images()
    sr.requires_grad_()
    first = gradient_penalty(critic, sr, gt, generator=seeded(4))
    again = gradient_penalty(critic, sr, gt, generator=seeded(4))
    other = gradient_penalty(critic, sr, gt, generator=seeded(5))
    alpha = torch.rand(2, 1, 1, 1, generator=seeded(4))
    given = gradient_penalty(critic, sr, gt, alpha=alpha)
    assert first.item() == again.item() == given.item() != other.item()
    first.backward()
    assert sr.grad is None
    for wrong in ({}, {"generator": seeded(1), "alpha": alpha}):
        with pytest.raises(ValueError, match="either"):
            gradient_penalty(critic, sr, gt, **wrong)  # type: ignore[arg-type]
