"""Upsampling."""

from collections.abc import Sequence

import torch
from torch import Tensor

from timm_ext.layers.nodes import TrilinearNode, UpsampleNode
from timm_ext.layers.tape import Tape

TYPES = {"nearest": (torch.float32, torch.bfloat16), "trilinear": (torch.float32,)}


def interpolate(
    tape: Tape,
    input: Tensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor | None:
    """By two on each axis; a convolution right behind nearest-neighbour upsampling stands for both."""
    tape.forget()
    plain = align_corners is None or (mode == "trilinear" and not align_corners)
    if mode not in TYPES or not plain or antialias:
        return None
    if size is not None and recompute_scale_factor:
        return None
    if input.dim() != 5 or input.dtype not in TYPES[mode] or input.device.type != "cpu":
        return None
    if not _doubles(input, size, scale_factor) or tape.claim(input, None, None) is None:
        return None
    if mode == "trilinear":
        enlarged: Tensor = TrilinearNode.apply(input)  # type: ignore[no-untyped-call]
        return enlarged
    output: Tensor = UpsampleNode.apply(input)  # type: ignore[no-untyped-call]
    tape.upsampled = output, input
    return output


def _doubles(
    input: Tensor, size: int | Sequence[int] | None, scale_factor: float | Sequence[float] | None
) -> bool:
    """Tell whether each axis becomes twice as long."""
    if size is None:
        factors = tuple(scale_factor) if isinstance(scale_factor, Sequence) else (scale_factor,) * 3
        return factors == (2, 2, 2)
    sizes = tuple(size) if isinstance(size, Sequence) else (size,) * 3
    return scale_factor is None and sizes == tuple(2 * edge for edge in input.shape[2:])
