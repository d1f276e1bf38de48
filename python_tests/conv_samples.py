"""Arguments of `conv_weight_grad_square_`."""

import torch
from torch import Tensor


def case(
    outputs: int,
    inputs: int,
    sizes: list[int],
    kernel: list[int],
    *,
    stride: list[int] | None = None,
    padding: list[int] | None = None,
    dilation: list[int] | None = None,
    groups: int = 1,
    batch: int = 2,
) -> tuple[Tensor, Tensor, Tensor, dict[str, object]]:
    """acc, grad, input and the geometry of a convolution, drawn at random."""
    axes = len(sizes)
    stride, padding, dilation = stride or [1] * axes, padding or [0] * axes, dilation or [1] * axes
    out = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(sizes, kernel, stride, padding, dilation, strict=True)
    ]
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(batch, outputs, *out, generator=generator)
    input = torch.randn(batch, inputs, *sizes, generator=generator)
    return torch.rand(outputs, inputs // groups, *kernel, generator=generator), grad, input, geometry
