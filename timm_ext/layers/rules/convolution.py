"""Convolutions, plain, transposed and right behind nearest-neighbour upsampling."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from timm_ext.layers.convolution import Geometry
from timm_ext.layers.half_convolution import is_half, takes_tiles
from timm_ext.layers.nodes import ConvolutionNode, UpsampledConvolutionNode
from timm_ext.layers.rules.recording import autocast, beside, record
from timm_ext.layers.tape import Call, Tape


def _each(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * axes
    values = tuple(value)
    return values * axes if len(values) == 1 else values


def convolution(
    tape: Tape,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor | None:
    """Of one to three axes; right behind nearest-neighbour upsampling it stands for both."""
    upsampled, axes = tape.upsampled, weight.dim() - 2
    steps, gaps = _each(stride, axes), _each(dilation, axes)
    if isinstance(padding, str):
        if padding != "valid" and (padding != "same" or set(steps) != {1}):
            return None
        odd, pads = _named_padding(weight, gaps, padding)
    else:
        odd, pads = [], _each(padding, axes)
    geometry = Geometry(steps, pads, gaps, False, (0,) * axes, groups)
    if not _fits(geometry, input, weight, bias) or (call := tape.claim(input, weight, bias)) is None:
        return None
    call.rule, call.shifts = "convolution", True
    if upsampled is not None and input is upsampled[0] and geometry.takes_upsampled(weight):
        source = autocast(upsampled[1])
        by_tiles = is_half(source, weight) and takes_tiles(geometry, input, weight)
        if source.dtype in (torch.float32, torch.bfloat16) and not by_tiles:
            return record(UpsampledConvolutionNode, call, source, weight, bias, upsampled[0])
    return _convolve(call, functional.pad(input, odd) if any(odd) else input, weight, bias, geometry)


def _fits(g: Geometry, input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Tell whether arguments fit together; where they do not, PyTorch says so."""
    axes = weight.dim() - 2
    if input.dim() != weight.dim() or {len(g.stride), len(g.padding), len(g.dilation)} != {axes}:
        return False
    outer, inner = weight.shape[0], weight.shape[1] * g.groups
    inputs, outputs = (outer, inner) if g.transposed else (inner, outer)
    fit = inputs == input.shape[1] and (bias is None or bias.shape == (outputs,))
    least = min((*g.stride, *g.dilation, g.groups)) >= 1 and min(g.padding) >= 0
    return fit and least and outer % g.groups == 0


def _named_padding(
    weight: Tensor, dilation: tuple[int, ...], padding: str
) -> tuple[list[int], tuple[int, ...]]:
    """Return padding on both sides for 'same' and 'valid', and what an odd total pads the input itself by."""
    if padding == "valid":
        return [], (0,) * len(dilation)
    total = [gap * (size - 1) for gap, size in zip(dilation, weight.shape[2:], strict=False)]
    return [side for n in reversed(total) for side in (0, n % 2)], tuple(n // 2 for n in total)


def transposed_convolution(
    tape: Tape,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor | None:
    """Of one to three axes."""
    axes = weight.dim() - 2
    steps, pads, gaps = _each(stride, axes), _each(padding, axes), _each(dilation, axes)
    geometry = Geometry(steps, pads, gaps, True, _each(output_padding, axes), groups)
    if not _fits(geometry, input, weight, bias) or (call := tape.claim(input, weight, bias)) is None:
        return None
    call.rule, call.shifts = "transposed convolution", True
    return _convolve(call, input, weight, bias, geometry)


def _convolve(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    input = autocast(input)
    return record(ConvolutionNode, call, input, beside(input, weight), beside(input, bias), geometry)
