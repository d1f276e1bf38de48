"""The roads around ATen's own choices give what it gives."""

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
    geometry = Geometry((stride,) * 3, (padding,) * 3, (dilation,) * 3, False, (0, 0, 0), 1)
    x, weight, bias = tensors((1, 3, *size), (outputs, 3, *kernel), (outputs,))
    points = geometry.forward(x.double(), weight.double(), None)[0, 0].numel()
    assert geometry._would_be_slow(x, weight) == (points > 27)  # some are, some are not
    assert not geometry._suits_winograd(x, weight)
    assert_all_close(geometry, x, weight, bias)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pointwise(dtype, batch):
    geometry = Geometry((1,) * 3, (0,) * 3, (1,) * 3, False, (0, 0, 0), 1)
    x, weight, bias = (t.to(dtype) for t in tensors((batch, 5, 4, 3, 6), (7, 5, 1, 1, 1), (7,)))
    assert_all_close(geometry, x, weight, bias)


@pytest.mark.parametrize("padding", [(1, 1, 1), (0, 2, 1), (3, 0, 1)])
@pytest.mark.parametrize(("batch", "columns"), [(1, 3), (2, 1)])
def test_rows_that_suit_winograd(batch, columns, padding):
    geometry = Geometry((1,) * 3, padding, (1,) * 3, False, (0, 0, 0), 1)
    x, weight, bias = tensors((batch, 5, 9, 10, 21), (7, 5, 3, 3, columns), (7,))
    assert geometry._suits_winograd(x, weight)
    assert_all_close(geometry, x, weight, bias)


def tensors(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def assert_all_close(geometry, x, weight, bias):
    """Forward and both gradients are those of float64."""
    wide = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = geometry.forward(*wide)
    grad = tensors(expected.shape)[0]
    for_x, for_weight, _ = torch.autograd.grad(expected, wide, grad.double())

    def assert_close(got, wanted):
        assert got.shape == wanted.shape
        assert (got - wanted).abs().max() < 1e-5 * max(1, wanted.abs().max())

    assert_close(geometry.forward(x, weight, bias), expected)
    grad = grad.to(x.dtype)
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


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.ones(1, 3, 16, 16, 16).double()},
        {"x": torch.ones(1, 3, 32, 32, 6)},  # four columns of output
        {"x": torch.ones(1, 3, 32, 32, 19)},  # seventeen
        {"x": torch.ones(1, 3, 3, 32, 32)},  # one plane
        {"x": torch.ones(1, 3, 5, 5, 32)},  # 270 points
        {"geometry": Geometry((1,) * 3, (0,) * 3, (1,) * 3, True, (0,) * 3, 1)},
        {"geometry": Geometry((1, 1, 2), (0,) * 3, (1,) * 3, False, (0,) * 3, 1)},
        {"geometry": Geometry((1,) * 3, (0,) * 3, (1, 2, 1), False, (0,) * 3, 1)},
        {"geometry": Geometry((1,) * 3, (0,) * 3, (1,) * 3, False, (0,) * 3, 2)},
        {"weight": torch.ones(4, 3, 3, 1, 3)},
    ],
)
def test_other_calls_do_not_suit_winograd(change):
    geometry = Geometry((1,) * 3, (0,) * 3, (1,) * 3, False, (0,) * 3, 1)
    call = {"geometry": geometry, "x": torch.ones(1, 3, 16, 16, 16), "weight": torch.ones(4, 3, 3, 3, 3)}
    assert geometry._suits_winograd(call["x"], call["weight"])
    call |= change
    assert not call["geometry"]._suits_winograd(call["x"], call["weight"])
