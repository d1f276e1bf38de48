"""The roads around ATen's own choices give what it gives."""

import itertools

import pytest
import torch

from timm_ext.layers.convolution import Geometry, forward_way, gradient_way, upsampled_gradient
from timm_ext.ops.upsampled_conv3d import neighbour_sums3d

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
    assert forward_way(geometry, x.shape, weight.shape) == ("onednn" if points > 64 else "small")  # some are
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
    assert forward_way(geometry, x.shape, weight.shape) == "winograd"
    assert_all_close(geometry, x, weight, bias)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_way_back_through_a_stride(batch):
    geometry = Geometry((2,) * 3, (1,) * 3, (1,) * 3, False, (0, 0, 0), 1)
    x, weight, bias = tensors((batch, 5, 16, 17, 18), (7, 5, 3, 3, 3), (7,))
    assert gradient_way(geometry, (batch, 7, 8, 9, 9), x.shape, weight.shape)[0] == "strided"
    assert_all_close(geometry, x, weight, bias)


@pytest.mark.parametrize("shape", [(1, 5, 2, 2, 2), (2, 5, 2, 4, 4), (2, 5, 3, 4, 4), (1, 5, 6, 5, 9)])
def test_the_way_back_through_upsampling(shape):
    """With up to 64 points by one operator, with more by another."""
    batch, inputs, *sizes = shape
    x, weight, grad = tensors(shape, (7, inputs, 3, 3, 3), (batch, 7, *(2 * size for size in sizes)))
    wide = x.double().requires_grad_()
    output = torch.conv3d(torch.nn.functional.interpolate(wide, scale_factor=2), weight.double(), padding=1)
    (expected,) = torch.autograd.grad(output, wide, grad.double())
    result = upsampled_gradient(neighbour_sums3d(grad), weight)
    assert result.shape == expected.shape
    assert (result - expected).abs().max() < 1e-5 * expected.abs().max()


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


SIZES = {
    "geometry": Geometry((1,) * 3, (1,) * 3, (1,) * 3, False, (0,) * 3, 1),
    "input": (1, 3, 16, 16, 16),
    "weight": (4, 3, 3, 3, 3),
}


def ways(**change):
    """The way forward and back."""
    call = SIZES | change
    geometry, x, weight = call["geometry"], call["input"], call["weight"]
    grad = geometry.forward(torch.empty(x, device="meta"), torch.empty(weight, device="meta"), None)
    return forward_way(geometry, x, weight), gradient_way(geometry, grad.shape, x, weight)[0]


def changed(**options):
    fields = {"stride": (1,) * 3, "padding": (1,) * 3, "dilation": (1,) * 3} | options
    return Geometry(
        **{"transposed": False, "output_padding": (0,) * 3, "groups": 1} | fields,
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, ("winograd", "winograd")),
        ({"input": (1, 3, 32, 32, 4)}, ("onednn", "onednn")),  # four columns
        ({"input": (1, 3, 32, 32, 19)}, ("onednn", "onednn")),
        ({"input": (1, 3, 1, 32, 32)}, ("onednn", "onednn")),  # one plane
        ({"input": (1, 3, 5, 5, 16)}, ("onednn", "onednn")),  # 400 points
        ({"geometry": changed(stride=(1, 1, 2))}, ("onednn", "transposed")),
        ({"geometry": changed(dilation=(1, 2, 1))}, ("onednn", "onednn")),
        ({"geometry": changed(padding=(0, 1, 3))}, ("winograd", "transposed")),  # around by a negative number
        ({"geometry": changed(padding=(0, 1, 3)), "weight": (12, 3, 3, 3, 3)}, ("winograd", "transposed")),
        ({"weight": (4, 3, 3, 1, 3), "geometry": changed(padding=(1, 0, 1))}, ("onednn", "onednn")),
        ({"weight": (12, 3, 3, 1, 3), "geometry": changed(padding=(1, 0, 1))}, ("onednn", "transposed")),
        ({"input": (1, 3, 4, 4, 4)}, ("small", "small")),
        ({"input": (2, 3, 2, 4, 4)}, ("small", "small")),
        ({"geometry": changed(stride=(2, 2, 2))}, ("onednn", "strided")),
        ({"input": (2, 3, 16, 16, 16), "geometry": changed(stride=(2, 2, 2))}, ("aten", "strided")),
        ({"geometry": changed(stride=(2, 2, 2), padding=(1, 1, 2))}, ("onednn", "transposed")),
        ({"input": (1, 3, 8, 8, 8), "geometry": changed(stride=(2, 2, 2))}, ("small", "strided")),
        ({"input": (1, 3, 8, 8, 6), "geometry": changed(stride=(2, 2, 2))}, ("small", "aten")),  # 48 points
        ({"input": (3, 3, 8, 8, 6), "geometry": changed(stride=(2, 2, 2))}, ("aten", "aten")),
        ({"input": (2, 3, 4, 4, 5)}, ("aten", "aten")),  # two examples
        ({"input": (1, 3, 100, 100, 2), "weight": (4, 3, 1, 3, 3)}, ("aten", "aten")),
        ({"weight": (4, 3, 1, 1, 1), "geometry": changed(padding=(0, 0, 0))}, ("aten", "aten")),
        ({"geometry": changed(groups=3), "weight": (3, 1, 3, 3, 3)}, ("aten", "aten")),
        ({"geometry": changed(transposed=True), "weight": (3, 4, 3, 3, 3)}, ("aten", "aten")),
        (
            {
                "input": (1, 3, 16, 16),
                "weight": (4, 3, 3, 3),
                "geometry": Geometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1),
            },
            ("aten", "aten"),
        ),
    ],
)
def test_the_way_goes_by_sizes(change, expected):
    assert ways(**change) == expected


def test_other_types_are_left_to_aten():
    """Float64 has no other way: the same sizes in float32 go by Winograd's."""
    x, weight, bias = (t.double() for t in tensors(SIZES["input"], SIZES["weight"], (4,)))
    expected = torch.conv3d(x, weight, bias, padding=1)
    assert torch.equal(SIZES["geometry"].forward(x, weight, bias), expected)
