"""Weight gradients of pointwise convolutions at many points: summed, squared, and their bits."""

import pytest
import torch
from torch import Tensor

import timm_ext
from timm_ext.ops.conv3d import conv3d_weight_gradient

AROUND = {"stride": [1] * 3, "padding": [0] * 3, "dilation": [1] * 3}


def tensors(batch: int, outputs: int, inputs: int, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """grad and input."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(batch, channels, *sizes, generator=generator) for channels in (outputs, inputs))


def results(grad: Tensor, input: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over the batch, and half of the squares added to ones."""
    squares = torch.ones(grad.shape[1], input.shape[1], 1, 1, 1)
    timm_ext.conv_weight_grad_square_(squares, grad, input, **AROUND, scale=0.5)
    return conv3d_weight_gradient(grad, input, [1, 1, 1], **AROUND), squares


@pytest.mark.parametrize(
    ("batch", "outputs", "inputs", "sizes"),
    [
        (2, 3, 5, (8, 16, 16)),  # the fewest points
        (1, 7, 13, (11, 17, 19)),
        (3, 64, 64, (16, 16, 17)),  # the most weights, more than one chunk
        (2, 1, 1, (40, 50, 60)),
        (2, 65, 64, (16, 16, 16)),  # too many weights
        (2, 4, 6, (7, 16, 16)),  # too few points
    ],
)
def test_they_are_those_of_float64(batch: int, outputs: int, inputs: int, sizes: tuple[int, ...]) -> None:
    grad, input = tensors(batch, outputs, inputs, sizes)
    examples = torch.einsum("bop,bip->boi", grad.double().flatten(2), input.double().flatten(2))
    for found, expected in zip(
        results(grad, input), (examples.sum(0), 1 + 0.5 * examples.square().sum(0)), strict=True
    ):
        assert (found.flatten(1) - expected).norm() < 2e-6 * expected.norm()


def test_the_bits_do_not_depend_on_threads_or_strides() -> None:
    grad, input = tensors(2, 20, 30, (13, 14, 15))
    expected, threads = results(grad, input), torch.get_num_threads()
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            assert all(map(torch.equal, results(grad, input), expected))
    finally:
        torch.set_num_threads(threads)
    strided = (x.to(memory_format=torch.channels_last_3d) for x in (grad, input))
    assert all(map(torch.equal, results(*strided), expected))


def test_a_smaller_gradient_meets_the_first_points() -> None:
    grad, input = tensors(1, 2, 3, (13, 14, 15))
    found = conv3d_weight_gradient(grad[..., :14], input, [1, 1, 1], **AROUND)
    expected = conv3d_weight_gradient(grad[..., :14], input[..., :14], [1, 1, 1], **AROUND)
    assert torch.allclose(found, expected, rtol=1e-5)
