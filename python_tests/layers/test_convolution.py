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


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pointwise(dtype, batch, transposed):
    geometry = Geometry((1,) * 3, (0,) * 3, (1,) * 3, transposed, (0, 0, 0), 1)
    kernel = (5, 7) if transposed else (7, 5)
    x, weight, bias = (t.to(dtype) for t in tensors((batch, 5, 4, 3, 6), (*kernel, 1, 1, 1), (7,)))
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
    assert_close(geometry.summed_weight_gradient(grad, x, weight), for_weight)


def around(axes, stride=1, padding=1, dilation=1, transposed=False, output_padding=0, groups=1):
    """A geometry of the same number on each axis."""
    numbers = ((n,) * axes for n in (stride, padding, dilation))
    return Geometry(*numbers, transposed, (output_padding,) * axes, groups)


OTHERS = {
    "depthwise": (around(3, padding=2, groups=6), (2, 6, 9, 10, 21), (6, 1, 5, 5, 5)),
    "depthwise, stride 2": (around(3, stride=2, groups=6), (2, 6, 9, 10, 21), (6, 1, 3, 3, 3)),
    "depthwise, transposed": (
        around(3, stride=2, transposed=True, output_padding=1, groups=6),
        (2, 6, 5, 6, 21),
        (6, 1, 3, 3, 3),
    ),
    "depthwise, of images": (around(2, padding=3, groups=6), (2, 6, 20, 21), (6, 1, 7, 7)),
    "depthwise, of rows": (around(1, padding=4, groups=6), (2, 6, 40), (6, 1, 9)),
    "depthwise, transposed, of images": (
        around(2, stride=3, transposed=True, groups=6),
        (2, 6, 7, 8),
        (6, 1, 5, 5),
    ),
    "two outputs of a channel": (around(3, groups=6), (2, 6, 9, 10, 21), (12, 1, 3, 3, 3)),
    "groups of a few channels": (around(3, groups=3), (2, 6, 9, 10, 21), (12, 2, 3, 3, 3)),
    "groups of many channels": (around(3, groups=2), (2, 18, 9, 10, 21), (22, 9, 3, 3, 3)),
    "groups, transposed": (
        around(3, stride=2, transposed=True, output_padding=1, groups=2),
        (2, 6, 5, 6, 7),
        (6, 4, 3, 3, 3),
    ),
    "images": (around(2), (2, 5, 24, 33), (7, 5, 3, 3)),
    "images, stride 2": (around(2, stride=2, padding=2, dilation=2), (2, 5, 24, 33), (7, 5, 3, 2)),
    "images, transposed": (
        around(2, stride=2, padding=0, transposed=True),
        (2, 5, 12, 13),
        (5, 7, 2, 2),
    ),
    "transposed, pointwise": (around(3, padding=0, transposed=True), (2, 5, 6, 7, 20), (5, 3, 1, 1, 1)),
    "pointwise at many points": (around(3, padding=0), (2, 5, 12, 13, 20), (7, 5, 1, 1, 1)),
    "images, pointwise": (around(2, padding=0), (2, 5, 12, 13), (7, 5, 1, 1)),
    "few points of images": (around(2), (1, 5, 4, 6), (7, 5, 3, 3)),
    "rows": (around(1), (2, 5, 40), (7, 5, 3)),
    "rows, transposed": (around(1, stride=2, padding=0, transposed=True), (2, 5, 40), (5, 7, 2)),
    "kernels of 5": (around(3, padding=2), (2, 4, 12, 12, 18), (6, 4, 5, 5, 5)),
    "patches": (around(3, stride=8, padding=0), (2, 4, 16, 16, 24), (12, 4, 8, 8, 8)),
    "patches of images": (around(2, stride=16, padding=0), (1, 3, 32, 48), (12, 3, 16, 16)),
    "halved by 2": (around(3, stride=2, padding=0), (2, 4, 12, 14, 18), (6, 4, 2, 2, 2)),
    "doubled by 2": (around(3, stride=2, padding=0, transposed=True), (2, 4, 6, 7, 9), (4, 6, 2, 2, 2)),
    "more padding than kernel": (around(3, padding=5), (1, 2, 3, 4, 5), (3, 2, 3, 3, 3)),
    "a stride beyond the volume": (around(3, stride=50), (2, 3, 6, 7, 8), (4, 3, 3, 3, 3)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_groups_images_rows_and_patches(name):
    geometry, x, weight = OTHERS[name]
    outputs = weight[1] * geometry.groups if geometry.transposed else weight[0]
    assert_all_close(geometry, *tensors(x, weight, (outputs,)))


@pytest.mark.parametrize("name", OTHERS)
def test_their_bits_do_not_depend_on_threads(name):
    geometry, *sizes = OTHERS[name]
    x, weight = tensors(*sizes)
    (grad,), threads = tensors(geometry.forward(x, weight, None).shape), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            gradients = (
                f(grad, x, weight) for f in (geometry.input_gradient, geometry.summed_weight_gradient)
            )
            found.append([geometry.forward(x, weight, None), *gradients])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


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
        ({"input": (1, 3, 32, 32, 2)}, ("winograd", "winograd")),
        ({"input": (1, 3, 32, 32, 1)}, ("onednn", "onednn")),  # one column
        ({"weight": (4, 3, 1, 3, 3), "geometry": changed(padding=(0, 1, 1))}, ("winograd", "winograd")),
        (
            {"input": (1, 3, 1, 32, 32), "weight": (4, 3, 1, 3, 3), "geometry": changed(padding=(0, 1, 1))},
            ("winograd", "winograd"),
        ),
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
        ({"input": (1, 3, 100, 100, 2), "weight": (4, 3, 1, 1, 3)}, ("aten", "aten")),
        ({"weight": (4, 3, 1, 1, 1), "geometry": changed(padding=(0, 0, 0))}, ("aten", "aten")),
        ({"geometry": changed(groups=3), "weight": (6, 1, 3, 3, 3)}, ("aten", "aten")),
        ({"geometry": changed(groups=3), "weight": (24, 1, 3, 3, 3)}, ("groups", "aten")),
        ({"geometry": changed(groups=3), "weight": (3, 1, 3, 3, 3)}, ("depthwise", "depthwise")),
        ({"geometry": changed(groups=3, stride=(2, 2, 2)), "weight": (3, 1, 3, 3, 3)}, ("aten", "depthwise")),
        (
            {"input": (1, 3, 40, 16, 16), "geometry": changed(groups=3), "weight": (3, 1, 33, 3, 3)},
            ("aten", "aten"),
        ),
        (
            {"geometry": changed(groups=3, transposed=True, stride=(2, 2, 2)), "weight": (3, 1, 3, 3, 3)},
            ("depthwise", "depthwise"),
        ),
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
