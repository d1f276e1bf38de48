"""Convolutions of single points: a matrix times the channels."""

import torch
from torch import Tensor

from timm_ext.ops.memory import new_tensor


def channel_product(matrix: Tensor, input: Tensor, bias: Tensor | None) -> Tensor:
    """Return `matrix` times the channels of each point of `[B, C, ...]`, not differentiable."""
    output = new_tensor(input, (len(input), len(matrix), *input.shape[2:]))
    with torch.no_grad():
        each, factors, points = output.flatten(2), matrix.expand(len(input), *matrix.shape), input.flatten(2)
        if bias is None:
            torch.bmm(factors, points, out=each)
        else:
            torch.baddbmm(bias[:, None].expand_as(each), factors, points, out=each)
    return output
