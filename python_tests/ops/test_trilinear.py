"""Trilinear upsampling by two against PyTorch's in float64, its gradient, bits and messages."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from timm_ext.ops.trilinear import upsample_trilinear3d, upsample_trilinear3d_backward

SIZES = [(1, 1, 1, 1, 1), (2, 3, 1, 2, 5), (2, 3, 4, 3, 2), (1, 2, 5, 16, 17), (3, 1, 2, 33, 32)]


def drawn(*sizes: int) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0))


def enlarged(input: Tensor) -> Tensor:
    return functional.interpolate(input, scale_factor=2, mode="trilinear", align_corners=False)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_it_is_pytorchs(sizes) -> None:
    x = drawn(*sizes)
    torch.testing.assert_close(upsample_trilinear3d(x).double(), enlarged(x.double()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_gradient_is_pytorchs(sizes) -> None:
    x = drawn(*sizes).double().requires_grad_()
    grad = drawn(*sizes[:2], *(2 * size for size in sizes[2:]))
    (expected,) = torch.autograd.grad(enlarged(x), x, grad.double())
    found = upsample_trilinear3d_backward(grad)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=2e-6)


def test_a_constant_stays() -> None:
    constant = torch.full((1, 1, 6, 8, 10), 0.3)
    found = upsample_trilinear3d(constant[..., :3, :4, :5])
    torch.testing.assert_close(found, constant, rtol=2e-7, atol=0)


def test_the_bits_do_not_depend_on_threads_or_strides() -> None:
    x, grad = drawn(2, 3, 5, 9, 11), drawn(2, 3, 10, 18, 22)
    expected, threads = (
        (upsample_trilinear3d(x), upsample_trilinear3d_backward(grad)),
        torch.get_num_threads(),
    )
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for format in (torch.contiguous_format, torch.channels_last_3d):
                assert torch.equal(upsample_trilinear3d(x.to(memory_format=format)), expected[0])
                found = upsample_trilinear3d_backward(grad.to(memory_format=format))
                assert torch.equal(found, expected[1])
    finally:
        torch.set_num_threads(threads)


def test_of_nothing_is_nothing() -> None:
    assert upsample_trilinear3d(torch.zeros(0, 2, 3, 4, 5)).shape == (0, 2, 6, 8, 10)
    assert upsample_trilinear3d(torch.zeros(1, 2, 3, 0, 5)).shape == (1, 2, 6, 0, 10)
    assert upsample_trilinear3d_backward(torch.zeros(1, 2, 0, 4, 6)).shape == (1, 2, 0, 2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: upsample_trilinear3d(torch.zeros(1, 1, 2, 2)),
            "input must have 5 axes",
        ),
        (lambda: upsample_trilinear3d(torch.zeros(1, 1, 2, 2, 2).double()), "input must be float32"),
        (
            lambda: upsample_trilinear3d_backward(torch.zeros(1, 1, 2, 3, 2)),
            r"grad must be \[B, C, 2 D, 2 H, 2 W\] \(got \[1, 1, 2, 3, 2\]\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()
