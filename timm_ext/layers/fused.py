"""Which convolutions have their weight gradients squared by the fused operator.

The others go by the library that the framework uses, one example at a time, and `square_accumulate_`.
"""

import math
from typing import Any

import torch
from torch import Tensor

# Modelled for an H100 or H200, not measured: 33 TFLOP/s, half of what float32 allows, for cuDNN on tiles that
# are full, 25 for the fused kernel, which also brings its operands into shared memory; tensor cores cost next
# to nothing. cuDNN's weight gradient of one example takes about 20 µs of launches, the fused kernel 5 µs.
_SKINNY_OUTPUTS = 32  # cuDNN's tiles have 64 rows or more, of which at most half then work
_SMALL_FLOPS = 2**30  # (1/25 - 1/33) ps · FLOP < 15 µs
_SMALL_FLOPS_HALF = 2**29  # 1/25 ps · FLOP < 20 µs

_HALF = (torch.bfloat16, torch.float16)


def serves(accumulator: Tensor, grad: Tensor, input: Tensor, groups: int) -> bool:
    """Tell whether the fused operator takes these tensors, computes at the precision that is set, and pays.

    Args:
        accumulator: float32 or float64, of the weight's shape `[O, I / groups, ...]`.
        grad: `[B, O, ...]`, as `conv_weight_grad_square_` takes it (exchanged where transposed).
        input: `[B, I, ...]`.
        groups: of the convolution.
    """
    if accumulator.dtype != torch.float32 or grad.dtype != input.dtype:
        return False
    if accumulator.device.type == "cpu":
        return grad.dtype == torch.float32
    if accumulator.device.type != "cuda":
        return False
    if grad.dtype not in _HALF and not (grad.dtype == torch.float32 and products_are_ieee()):
        return False
    outputs, columns = accumulator.shape[0] // groups, math.prod(accumulator.shape[1:])
    return prefers_fused(groups, outputs, columns, math.prod(grad.shape[2:]), half=grad.dtype in _HALF)


def prefers_fused(groups: int, outputs: int, columns: int, points: int, *, half: bool = False) -> bool:
    """Tell whether the fused operator is expected to beat cuDNN example by example, by sizes alone.

    It is for few outputs, which leave cuDNN's tiles empty, and for small products, which launches dominate.
    A benchmark may put another rule in its place.

    Args:
        groups: of the convolution.
        outputs: channels of a group's output.
        columns: input channels of a group times taps.
        points: of the output of one example.
        half: whether the tensors are bfloat16 or float16, for which cuDNN has tensor cores.
    """
    flops = 2 * groups * outputs * columns * points
    if half:
        return flops <= _SMALL_FLOPS_HALF
    return outputs <= _SKINNY_OUTPUTS or flops <= _SMALL_FLOPS


def products_are_ieee() -> bool:
    """Tell whether cuDNN convolves float32 in IEEE arithmetic."""
    cudnn: Any = torch.backends.cudnn
    return bool(cudnn.conv.fp32_precision == "ieee")
