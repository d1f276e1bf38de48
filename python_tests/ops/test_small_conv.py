"""`small_conv3d`, mirrored or not, against the direct convolution in float64, its bits, the messages."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import conv3d

from timm_ext.ops.conv3d import small_conv3d

ONES = {"stride": [1, 1, 1], "dilation": [1, 1, 1]}


def arguments(
    batch: int, inputs: int, outputs: int, sizes: list[int], kernel: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """input, weight and bias drawn at random; outputs are of the order of one."""
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, inputs, *sizes), (outputs, inputs, *kernel), (outputs,)
    input, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    return input, weight / weight[0].numel() ** 0.5, bias


def check(input: Tensor, weight: Tensor, bias: Tensor | None, **geometry: list[int]) -> None:
    """The operator gives the convolution, and mirrored what the mirrored weight gives."""
    wide = (None if tensor is None else tensor.double() for tensor in (input, weight, bias))
    expected = conv3d(*wide, **geometry)
    turned = weight.flip(2, 3, 4).transpose(0, 1)
    for mirrored, factor in ((False, weight), (True, turned), (True, turned.contiguous())):
        result = small_conv3d(input, factor, bias, mirrored=mirrored, **geometry)
        assert result.dtype == torch.float32
        assert result.shape == expected.shape
        assert (result - expected).abs().max() < 5e-6


@pytest.mark.parametrize(
    ("batch", "inputs", "outputs", "sizes", "kernel"),
    [
        (1, 40, 24, [4, 4, 4], [3, 3, 3]),
        (2, 17, 9, [2, 2, 2], [3, 3, 3]),
        (1, 5, 3, [5, 3, 7], [3, 1, 2]),
        (3, 4, 8, [4, 4, 4], [1, 1, 1]),
        (1, 2, 5, [6, 6, 6], [8, 8, 8]),
        (2, 33, 1, [1, 1, 9], [1, 1, 4]),
    ],
)
def test_it_is_the_convolution(batch, inputs, outputs, sizes, kernel) -> None:
    input, weight, bias = arguments(batch, inputs, outputs, sizes, kernel)
    check(input, weight, bias, padding=[1, 1, 1], **ONES)
    check(input, weight, None, padding=[1, 1, 1], **ONES)


@settings(max_examples=60)
@given(st.data())
def test_any_geometry(data: st.DataObject) -> None:
    kernel, padding, dilation, stride, more = (
        [data.draw(st.integers(low, high)) for _ in range(3)]
        for low, high in ((1, 4), (0, 3), (1, 2), (1, 3), (0, 4))
    )
    reach = [gap * (size - 1) + 1 for gap, size in zip(dilation, kernel, strict=True)]
    least = [max(1, far - 2 * pad) for far, pad in zip(reach, padding, strict=True)]
    sizes = [low + extra for low, extra in zip(least, more, strict=True)]
    batch, inputs, outputs = (data.draw(st.integers(1, most)) for most in (3, 20, 20))
    input, weight, bias = arguments(batch, inputs, outputs, sizes, kernel)
    check(input, weight, bias, stride=stride, padding=padding, dilation=dilation)


def test_mirrored_it_is_the_inputs_gradient() -> None:
    input, weight, _ = (tensor.double() for tensor in arguments(2, 6, 10, [4, 3, 5], [3, 3, 2]))
    output = conv3d(input.requires_grad_(), weight, padding=[1, 0, 1])
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    (expected,) = torch.autograd.grad(output, input, grad.double())
    result = small_conv3d(grad, weight.float(), padding=[1, 2, 0], mirrored=True, **ONES)
    assert (result - expected).abs().max() < 5e-6


def test_what_is_not_finite_stays_near() -> None:
    input, weight, bias = arguments(2, 3, 4, [6, 6, 6], [3, 3, 3])
    clean = small_conv3d(input, weight, bias, padding=[0, 0, 0], **ONES)
    input[1, 0, 0, 0, 0] = float("nan")
    result = small_conv3d(input, weight, bias, padding=[0, 0, 0], **ONES)
    assert result[1, :, 0, 0, 0].isnan().all()
    clean[1, :, 0, 0, 0] = result[1, :, 0, 0, 0] = 0
    assert torch.equal(result, clean)


def test_the_bits_do_not_depend_on_threads_or_strides() -> None:
    input, weight, bias = arguments(2, 20, 21, [4, 5, 3], [3, 3, 3])
    expected = small_conv3d(input, weight, bias, padding=[1, 1, 1], **ONES)
    strided = [x.to(memory_format=torch.channels_last_3d) for x in (input, weight)]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for x, w in ((input, weight), strided):
                assert torch.equal(small_conv3d(x, w, bias, padding=[1, 1, 1], **ONES), expected)
    finally:
        torch.set_num_threads(threads)


def test_an_empty_batch_has_an_empty_result() -> None:
    call = arguments(0, 3, 4, [4, 5, 6], [3, 3, 3])
    assert small_conv3d(*call, padding=[1, 1, 0], **ONES).shape == (0, 4, 4, 5, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(1, 2, 4, 4, 4).double()}, r"input must be float32 \(got float64\)"),
        ({"input": torch.zeros(2, 4, 4, 4)}, r"input must have 5 axes \(got \[2, 4, 4, 4\]\)"),
        ({"weight": torch.zeros(4, 3, 3, 3, 3)}, r"weight must be \[O, 2, \.\.\.\] for input .*got \[4, 3,"),
        ({"mirrored": True}, r"weight must be \[2, O, \.\.\.\], mirrored, for input .*got \[4, 2,"),
        ({"weight": torch.zeros(4, 2, 3, 0, 3)}, r"weight must be \[O, 2, \.\.\.\]"),
        ({"bias": torch.zeros(3)}, r"bias must be \[4\], contiguous \(got \[3\]\)"),
        ({"bias": torch.zeros(8)[::2]}, r"bias must be \[4\], contiguous"),
        ({"padding": [1, 1]}, r"padding must hold 3 numbers >= 0 \(got \[1, 1\]\)"),
        ({"padding": [1, -1, 1]}, r"padding must hold 3 numbers >= 0"),
        ({"stride": [1, 0, 1]}, r"stride must hold 3 numbers >= 1 \(got \[1, 0, 1\]\)"),
        ({"dilation": [1, 1, 1, 1]}, r"dilation must hold 3 numbers >= 1"),
        ({"dilation": [1, 2, 1]}, r"input with its padding must be at least as large"),
    ],
)
def test_what_does_not_fit_is_refused(change, message) -> None:
    input, weight, bias = arguments(1, 2, 4, [4, 4, 4], [3, 3, 3])
    call = {"input": input, "weight": weight, "bias": bias, "padding": [0, 0, 0], **ONES} | change
    with pytest.raises(RuntimeError, match="small_conv3d: " + message):
        small_conv3d(**call)
