"""One step of the optimisers: gradients of all samples of the step over passes and processes, then the update.

Gradients are those of one process with the whole batch: every pass and process has equally many samples and every loss
is a mean over samples. Exceptions, which look at a whole batch: the published critic's BatchNorm and the perceptual
loss with the official norm see the samples of one pass of one process.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mrefsr.data import Batch
from mrefsr.infer import DTYPES
from mrefsr.losses import adversarial_loss, critic_loss, gradient_penalty, reconstruction
from mrefsr.machines import Machine
from mrefsr.training_state import Training, average_weights, rate_factor


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """What `take_gradients` found, beside the gradients themselves. `losses` are this process's means."""

    losses: dict[str, float]
    group_ids: tuple[str, ...]


def parallel(training: Training, machine: Machine) -> nn.Module:
    """The model as the steps call it: the mean of the gradients over the processes comes with the backward pass."""
    if machine.world_size == 1:
        return training.model
    config = training.config
    # 1x1 convolutions have strides that count as either memory layout; it costs nothing.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*broadcast_buffers")
        return DistributedDataParallel(
            training.model,
            device_ids=[machine.device] if machine.device.type == "cuda" else None,
            broadcast_buffers=False,  # they are constants
            # A batch without any reference leaves most of the network without a gradient.
            find_unused_parameters=config.no_reference_share > 0 or config.min_references == 0,
        )


def take_gradients(training: Training, net: nn.Module, machine: Machine, batches: Iterator[Batch]) -> Gradients:
    """Gradients of step `training.step + 1` in the parameters of network and critic; nothing else is changed."""
    config, step = training.config, training.step + 1
    judged = step >= config.adversarial_from
    critic = training.critic if judged else None
    training.optimiser.zero_grad(set_to_none=True)
    if training.critic_optimiser is not None:
        training.critic_optimiser.zero_grad(set_to_none=True)
    sums: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64, device="cpu"))
    ids: tuple[str, ...] = ()
    for number in range(config.accumulate):
        batch = next(batches)
        ids += batch.group_ids
        last = number == config.accumulate - 1
        # The gradients of all passes but the last stay in this process; the last one brings the processes together.
        alone = contextlib.nullcontext() if last or not isinstance(net, DistributedDataParallel) else net.no_sync()
        with alone:
            with _autocast(training, machine):
                sr = net(batch.lr, batch.enlarged, batch.references, batch.mask, recompute=config.recompute)
            parts = _judge(training, sr.float(), batch.target, judged)
            loss = sum(
                (weight * value for weight, value in parts.values()), start=sr.new_zeros((), dtype=torch.float32)
            )
            training.scaler.scale(loss / config.accumulate).backward()  # type: ignore[no-untyped-call]
        found = {"loss": loss} | {name: value for name, (_, value) in parts.items()}
        if critic is not None:
            found |= _teach_critic(
                training, sr.detach().float(), batch.target, _mixing(training, machine, number, batch)
            )
        for name, value in found.items():
            sums[name] = sums[name] + value.detach().double() / config.accumulate
    if critic is not None:
        machine.average_gradients(critic.parameters())
    values = torch.stack([value.to(machine.device) for value in sums.values()]).tolist()  # one wait for the GPU
    return Gradients(losses=dict(zip(sums, values, strict=True)), group_ids=ids)


def clip_gradients(training: Training) -> float:
    """Norm of the network's gradient, after which it is at most the recipe's `clip`."""
    training.scaler.unscale_(training.optimiser)
    parameters = [parameter for parameter in training.model.network.parameters() if parameter.grad is not None]
    return float(nn.utils.clip_grad_norm_(parameters, training.config.clip or math.inf))


def update(training: Training) -> None:
    """Take the step that the gradients are for: network, then critic, then averaged weights."""
    factor = rate_factor(training.config, training.step + 1)
    for group in training.optimiser.param_groups:
        group["lr"] = group["base_lr"] * factor
    training.scaler.step(training.optimiser)
    training.scaler.update()
    if training.critic_optimiser is not None:
        training.critic_optimiser.step()  # does nothing as long as there are no gradients
    training.step += 1
    average_weights(training)


def _autocast(training: Training, machine: Machine) -> contextlib.AbstractContextManager[object]:
    dtype = DTYPES[training.config.precision]
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(machine.device.type, dtype)


def _judge(training: Training, sr: Tensor, target: Tensor, judged: bool) -> dict[str, tuple[float, Tensor]]:
    """{loss: (weight, value)} of the generator."""
    config = training.config
    # While nothing else judges, L1 counts even where the recipe gives it no weight later.
    parts = {"l1": (config.l1 if judged else config.l1 or 1.0, reconstruction(sr, target))}
    if judged and training.perceptual is not None:
        parts["perceptual"] = (config.perceptual, training.perceptual(sr, target))
    if judged and training.critic is not None:
        training.critic.requires_grad_(False)
        parts["adversarial"] = (config.adversarial, adversarial_loss(training.critic(sr)))
    return parts


def _teach_critic(training: Training, sr: Tensor, target: Tensor, alpha: Tensor) -> dict[str, Tensor]:
    """Gradients of the critic's loss, on the pictures that the network has just made; they add up over passes."""
    config, critic = training.config, training.critic
    assert critic is not None
    critic.requires_grad_(True)
    restored, real = critic(sr), critic(target)
    distance = critic_loss(restored, real=False) + critic_loss(real, real=True)
    penalty = gradient_penalty(critic, sr, target, alpha=alpha, weight=config.gradient_penalty)
    ((distance + penalty) / config.accumulate).backward()  # type: ignore[no-untyped-call]
    return {"critic": distance, "penalty": penalty}


def _mixing(training: Training, machine: Machine, number: int, batch: Batch) -> Tensor:
    """Mixing numbers B111 of the penalty for this pass. They belong to the samples of the step, so that neither the
    number of processes nor a stop in between changes them."""
    config = training.config
    seed = (config.seed * 1_000_003 + training.step + 1) % 2**63
    whole = torch.rand(config.batch, 1, 1, 1, generator=torch.Generator().manual_seed(seed))
    size = len(batch.lr)
    first = (number * machine.world_size + machine.rank) * size
    return whole[first : first + size]
