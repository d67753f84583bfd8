"""Exact dense patch matching: for every 3x3 patch of the input's features, the best 3x3 patch of a reference's.

"Best" is the largest <P, Q> / (||Q|| + 1e-5) over all patches Q of the reference, both read as 9 C numbers (the rule of
C2-Matching and MRefSR); of equal ones the first in reading order. Sizes of input and reference are independent.

Three backends give the same answer up to float32 rounding (near-ties within about 1e-6 of the value may fall either
way): `numba` on CPUs, `triton` on CUDA GPUs, `torch` anywhere and for strides other than 1. Equal patches tie exactly.
Nothing here carries gradients. Importing this module neither imports nor compiles a kernel.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from lmr_tools.schema import LmrError

PATCH = 3
NORM_FLOOR = 1e-5  # added to a patch's norm before dividing, as published
BACKENDS = ("numba", "triton", "torch")
TORCH_BLOCK = 1 << 18  # elements of one block of correlations in the torch backend: 1 MB, which a CPU's caches hold
TORCH_BLOCK_GPU = 1 << 24  # there few and large launches matter more


class PatchSizeError(LmrError, ValueError):
    """Features smaller than one patch: nothing can be matched."""


def normalize_channels(features: Tensor) -> Tensor:
    """L2-normalise (..., C, H, W) features over C at each pixel; zero pixels stay zero."""
    return functional.normalize(features, dim=-3)


def match_patches(
    feat_in: Tensor,
    feat_ref: Tensor,
    *,
    input_stride: int = 1,
    ref_stride: int = 1,
    normalize_ref: bool = True,
    normalize_input: bool = True,
    backend: str | None = None,
    threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Best reference patch of every input patch.

    Args:
        feat_in: (C, h, w) features of the input; any floating type, computed in float32 (float64 stays float64).
        feat_ref: (C, h2, w2) features of the reference, on the same device.
        input_stride, ref_stride: step of the patch grids in pixels; values other than 1 take the slower torch backend.
        normalize_ref: divide by ||Q|| + 1e-5; without it the plain inner product decides.
        normalize_input: divide the value by ||P|| + 1e-5; it does not change the choice.
        backend: one of `BACKENDS`; None chooses.
        threads: for `numba`; None takes torch's number. The result does not depend on it.

    Returns:
        index (h', w') int64 into the reference's patch grid, row by row, and value (h', w') float32; h' = (h - 3) //
        input_stride + 1. The grid's width, to take an index apart, is (w2 - 3) // ref_stride + 1.

    Raises:
        PatchSizeError: input or reference is smaller than 3x3.
        ValueError: shapes, devices or options that do not fit together.
    """
    _check(feat_in, feat_ref, input_stride, ref_stride)
    strided = (input_stride, ref_stride) != (1, 1)
    chosen = backend or ("torch" if strided else _choose_backend(feat_in))
    if chosen not in BACKENDS:
        raise ValueError(f"matching backend {chosen!r} is unknown: choose one of {', '.join(BACKENDS)}")
    if strided and chosen != "torch":
        raise ValueError(f"matching backend {chosen!r} has no strides: use 'torch'")
    # Autocast would turn the products into half precision, and indices would no longer be exact.
    with torch.no_grad(), torch.autocast(feat_in.device.type, enabled=False):
        exact = torch.promote_types(feat_in.dtype, feat_ref.dtype) == torch.float64 and chosen == "torch"
        dtype = torch.float64 if exact else torch.float32
        feat_in, feat_ref = feat_in.detach().to(dtype), feat_ref.detach().to(dtype)
        norm_ref = _patch_norms(feat_ref)
        scale = 1 / (norm_ref + NORM_FLOOR) if normalize_ref else torch.ones_like(norm_ref)
        if chosen == "numba":
            from mrefsr import matching_cpu

            index, value = matching_cpu.match(feat_in, feat_ref, scale, threads=threads or torch.get_num_threads())
        elif chosen == "triton":
            from mrefsr import matching_triton

            index, value = matching_triton.match(feat_in, feat_ref, scale)
        else:
            index, value = _match_torch(feat_in, feat_ref, scale, input_stride, ref_stride)
        if normalize_input:
            value = value / (_patch_norms(feat_in)[::input_stride, ::input_stride] + NORM_FLOOR)
    return index, value.float()


def match_batch(
    feat_in_BCHW: Tensor,
    feat_refs: Tensor | Sequence[Tensor],
    ref_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Match every item of a batch with each of its references, patch stride 1, both norms on.

    Args:
        feat_in_BCHW: features of the inputs, normalised over channels by the caller (`normalize_channels`).
        feat_refs: (B, N, C, h2, w2), or a list of N references (B, C, h2, w2) whose sizes may differ.
        ref_mask: (B, N) bool, False where a reference is only padding; that one costs nothing and gets zeros.

    Returns:
        index int64 and value float32, both (B, N, h - 2, w - 2); an index counts in its reference's own patch grid,
        whose width is that reference's w2 - 2.
    """
    refs = list(feat_refs.unbind(1)) if isinstance(feat_refs, Tensor) else list(feat_refs)
    batch, _, height, width = feat_in_BCHW.shape
    if ref_mask is not None and tuple(ref_mask.shape) != (batch, len(refs)):
        raise ValueError(f"reference mask has shape {tuple(ref_mask.shape)}, expected {(batch, len(refs))}")
    if wrong := [tuple(ref.shape) for ref in refs if ref.shape[0] != batch]:
        raise ValueError(f"reference features {wrong[0]} do not have the input's batch size {batch}")
    shape = (batch, len(refs), max(0, height - PATCH + 1), max(0, width - PATCH + 1))
    index = torch.zeros(shape, dtype=torch.int64, device=feat_in_BCHW.device)
    value = torch.zeros(shape, dtype=torch.float32, device=feat_in_BCHW.device)
    wanted = [[True] * len(refs)] * batch if ref_mask is None else ref_mask.tolist()
    for b in range(batch):
        for n, ref in enumerate(refs):
            if wanted[b][n]:
                index[b, n], value[b, n] = match_patches(feat_in_BCHW[b], ref[b])
    return index, value


def flow_from_index(index: Tensor, ref_patch_width: int | Tensor) -> Tensor:
    """Where each patch's match lies, relative to the patch: (..., h', w') index -> (..., h', w', 2) int32, (x, y).

    `ref_patch_width` is the width of the reference's patch grid (w2 - 2), or a tensor of widths that broadcasts
    against `index`, such as (N, 1, 1). Stride 1 on both sides.
    """
    height, width = index.shape[-2:]
    y = torch.div(index, ref_patch_width, rounding_mode="floor")
    x = index - y * ref_patch_width
    x = x - torch.arange(width, device=index.device)
    y = y - torch.arange(height, device=index.device)[:, None]
    return torch.stack((x, y), -1).to(torch.int32)


def tap_flow(flow: Tensor, scale: int) -> Tensor:
    """The flow for each tap of a 3x3 deformable convolution on a `scale` times finer grid.

    A patch's flow belongs to its top-left pixel. Tap (i, j) of the convolution takes the flow of the patch in which the
    pixel is number (i, j): the flow moved down by i * scale and right by j * scale, zero where there is no such patch.

    Args:
        flow: (..., h - 2, w - 2, 2) from `flow_from_index`, in pixels of the matching grid.
        scale: 1, 2 or 4: vectors are multiplied by it and repeated scale x scale times.

    Returns:
        (..., 9, h * scale, w * scale, 2), taps row by row, same type, in pixels of the finer grid.
    """
    rows, columns = flow.shape[-3] * scale, flow.shape[-2] * scale
    fine = (flow * scale).repeat_interleave(scale, -3).repeat_interleave(scale, -2)
    margin = (PATCH - 1) * scale
    taps = flow.new_zeros(*flow.shape[:-3], PATCH * PATCH, rows + margin, columns + margin, 2)
    for tap in range(PATCH * PATCH):
        down, right = (tap // PATCH) * scale, (tap % PATCH) * scale
        taps[..., tap, down : down + rows, right : right + columns, :] = fine
    return taps


def _check(feat_in: Tensor, feat_ref: Tensor, input_stride: int, ref_stride: int) -> None:
    for name, features in (("input", feat_in), ("reference", feat_ref)):
        if features.dim() != 3 or features.shape[0] == 0 or not features.is_floating_point():
            raise ValueError(
                f"{name} features must be floating (C, H, W), not {features.dtype} {tuple(features.shape)}"
            )
        if min(features.shape[1:]) < PATCH:
            raise PatchSizeError(
                f"{name} features of {features.shape[2]}x{features.shape[1]} (width x height) are smaller than a "
                f"{PATCH}x{PATCH} patch: give a larger image"
            )
    if feat_in.shape[0] != feat_ref.shape[0]:
        raise ValueError(f"input has {feat_in.shape[0]} feature channels, reference {feat_ref.shape[0]}")
    if feat_in.device != feat_ref.device:
        raise ValueError(f"input features are on {feat_in.device}, reference features on {feat_ref.device}")
    if min(input_stride, ref_stride) < 1:
        raise ValueError(f"strides must be at least 1, not {input_stride} and {ref_stride}")


def _choose_backend(features: Tensor) -> str:
    device = features.device.type
    if device == "cpu" and features.dtype != torch.float64 and importlib.util.find_spec("numba"):
        return "numba"
    if device == "cuda" and importlib.util.find_spec("triton"):
        return "triton"
    return "torch"


def _patch_norms(features: Tensor) -> Tensor:
    """L2 norm of every 3x3 patch: (C, H, W) -> (H - 2, W - 2).

    Summed in float64 where the device has it, so that equal patches have equal norms wherever they lie.
    """
    wide = torch.float32 if features.device.type == "mps" else torch.float64
    energy = features.new_zeros(features.shape[1:], dtype=wide)
    for block in torch.split(
        features, 16
    ):  # a few channels at a time: a float64 copy of all would be the largest array here
        energy += block.to(wide).square().sum(0)
    rows = energy[:-2] + energy[1:-1] + energy[2:]
    return (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]).sqrt().to(features.dtype)


def _match_torch(
    feat_in: Tensor, feat_ref: Tensor, scale: Tensor, input_stride: int, ref_stride: int
) -> tuple[Tensor, Tensor]:
    """Plain torch: one product of width C per input row and band of the reference, then sums along the diagonals."""
    depth, height, width = feat_in.shape
    width_ref = feat_ref.shape[2]
    scale = scale[::ref_stride, ::ref_stride]
    grid_rows, grid_columns = scale.shape
    last_in, last_ref = width - PATCH + 1, width_ref - PATCH + 1
    shape = ((height - PATCH) // input_stride + 1, (width - PATCH) // input_stride + 1)
    best = feat_in.new_full(shape, float("-inf"))
    index = torch.zeros(shape, dtype=torch.int64, device=feat_in.device)
    block = TORCH_BLOCK if feat_in.device.type == "cpu" else TORCH_BLOCK_GPU
    band = max(1, block // (width * width_ref * ref_stride))  # rows of the reference's patch grid
    for top in range(0, grid_rows, band):
        band_scale = scale[top : top + band]
        patch_rows = (len(band_scale) - 1) * ref_stride + 1
        columns = feat_ref[:, top * ref_stride : top * ref_stride + patch_rows + 2].reshape(depth, -1)
        ring: list[Tensor] = []  # sums along x of the last three input rows
        for y in range(height):
            s = torch.mm(feat_in[:, y].T, columns).view(width, patch_rows + 2, width_ref)
            dx = [s[d : last_in + d : input_stride, :, d : last_ref + d : ref_stride] for d in range(PATCH)]
            ring = [*ring[-2:], dx[0] + dx[1] + dx[2]]
            row, off_grid = divmod(y - 2, input_stride)
            if y < 2 or off_grid:
                continue
            dy = [ring[d][:, d : d + patch_rows : ref_stride] for d in range(PATCH)]
            score = ((dy[0] + dy[1] + dy[2]) * band_scale).flatten(1)
            top_score, place = score.max(1)
            better = top_score > best[row]  # strict, and bands ascend: the first of equals stays
            best[row] = torch.where(better, top_score, best[row])
            index[row] = torch.where(better, place + top * grid_columns, index[row])
    return index, best
