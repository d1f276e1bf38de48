"""The roads around the slow kernel give what ATen gives."""

import itertools

import pytest
import torch

from timm_ext.fisher.convolution import Geometry

CASES = [
    (size, kernel, stride, dilation, padding, outputs)
    for size, kernel, stride, dilation, padding, outputs in itertools.product(
        [(8, 6, 7), (9, 5, 6)], [(3, 3, 3), (2, 3, 1), (1, 3, 3)], [1, 2], [1, 2], [0, 1], [4, 12]
    )
]


@pytest.mark.parametrize(("size", "kernel", "stride", "dilation", "padding", "outputs"), CASES)
def test_one_small_example(size, kernel, stride, dilation, padding, outputs):
    generator = torch.Generator().manual_seed(0)
    geometry = Geometry((stride,) * 3, (padding,) * 3, (dilation,) * 3, False, (0, 0, 0), 1)
    x = torch.randn(1, 3, *size, generator=generator)
    weight, bias = (torch.randn(outputs, *n, generator=generator) for n in ((3, *kernel), ()))
    assert geometry._would_be_slow(x, weight)
    wide = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = geometry.forward(*wide)
    grad = torch.randn(expected.shape, generator=generator)
    for_x, for_weight, _ = torch.autograd.grad(expected, wide, grad.double())

    def assert_close(got, wanted):
        assert got.shape == wanted.shape
        assert (got - wanted).abs().max() < 1e-5 * max(1, wanted.abs().max())

    assert_close(geometry.forward(x, weight, bias), expected)
    assert_close(geometry.input_gradient(grad, x, weight), for_x)
    assert_close(geometry.weight_gradient(grad, x, weight), for_weight)


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.ones(2, 3, 8, 8, 8)},
        {"x": torch.ones(1, 3, 8, 8, 8).double()},
        {"x": torch.ones(1, 3, 100, 100, 2)},
        {"geometry": Geometry((1,) * 3, (0,) * 3, (1,) * 3, True, (0,) * 3, 1)},
        {"weight": torch.ones(4, 3, 1, 1, 1)},
    ],
)
def test_other_calls_are_left_to_aten(change):
    geometry = Geometry((1,) * 3, (0,) * 3, (1,) * 3, False, (0,) * 3, 1)
    call = {"geometry": geometry, "x": torch.ones(1, 3, 8, 8, 8), "weight": torch.ones(4, 3, 3, 3, 3)}
    assert geometry._would_be_slow(call["x"], call["weight"])
    call |= change
    assert not call["geometry"]._would_be_slow(call["x"], call["weight"])
