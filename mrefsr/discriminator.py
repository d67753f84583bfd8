"""The critic of the GAN recipe, as published, and a clean variant that fits the gradient penalty."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

SLOPE = 0.2
WIDTHS = (32, 64, 128, 256, 512)
HIDDEN = 1024


class Discriminator(nn.Module):
    """Scores of images: B3HW in [0, 1], any H and W -> B111. 5.24 M parameters, tensor names as published.

    Five blocks of two 3x3 convolutions, the second one halving the size, each with BatchNorm and leaky ReLU; the mean
    over all pixels; two 1x1 convolutions; a sigmoid.

    clean: leave out BatchNorm and the sigmoid. WGAN-GP bounds the critic's gradient for each picture by itself, but
    under BatchNorm a score depends on the whole batch, so there is no such gradient; and a Wasserstein critic estimates
    a distance, to which a sigmoid puts an end at 1, where its slope and with it the generator's signal vanish. The
    published critic has both all the same, hence it is the default.

    generator: fills every parameter, on the CPU: published, N(0, 0.02) for convolutions, N(1, 0.02) for BatchNorm's
    scales; clean, He's normal, as nothing else keeps the signal alive. Biases are 0. None leaves torch's own start, for
    weights that are loaded.
    """

    def __init__(self, *, clean: bool = False, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.clean = clean
        inputs = 3
        for number, width in enumerate(WIDTHS, start=1):
            setattr(self, f"conv_block{number}", self._block(inputs, width))
            inputs = width
        self.out_block = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(inputs, HIDDEN, 1),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(HIDDEN, 1, 1),
            nn.Identity() if clean else nn.Sigmoid(),
        )
        if generator is not None:
            self._initialise(generator)

    def _block(self, inputs: int, width: int) -> nn.Sequential:
        # Identity keeps the places, and so the tensors' names, of the published network.
        layers: list[nn.Module] = []
        for cin, stride in ((inputs, 1), (width, 2)):
            norm = nn.Identity() if self.clean else nn.BatchNorm2d(width)
            layers += [nn.Conv2d(cin, width, 3, stride, 1), norm, nn.LeakyReLU(SLOPE)]
        return nn.Sequential(*layers)

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                he = math.sqrt(2 / (1 + SLOPE**2) / module.weight[0].numel())
                module.weight.normal_(0, he if self.clean else 0.02, generator=generator)
                assert module.bias is not None
                module.bias.zero_()
            elif isinstance(module, nn.BatchNorm2d):
                module.weight.normal_(1, 0.02, generator=generator)
                module.bias.zero_()

    def forward(self, image: Tensor) -> Tensor:
        """B3HW -> B111."""
        x = image
        for number in range(1, len(WIDTHS) + 1):
            x = self.get_submodule(f"conv_block{number}")(x)
        return self.out_block(x)  # type: ignore[no-any-return]
