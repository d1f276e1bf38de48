"""`winograd_conv3d` against the direct convolution in float64, its precision, and the messages."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import conv3d

from timm_ext.ops.conv3d import winograd_conv3d


def arguments(batch: int, inputs: int, outputs: int, sizes: list[int], columns: int = 3) -> list[Tensor]:
    """input, weight and bias drawn at random; outputs are of the order of one."""
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, inputs, *sizes), (outputs, inputs, 3, 3, columns), (outputs,)
    input, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    return [input, weight / (9 * columns * inputs) ** 0.5, bias]


def error(result: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int]) -> Tensor:
    wide = (tensor if tensor is None else tensor.double() for tensor in (input, weight, bias))
    expected = conv3d(*wide, padding=padding)
    assert result.shape == expected.shape
    return result.double() - expected


@pytest.mark.parametrize(
    ("batch", "inputs", "outputs", "sizes", "columns", "padding"),
    [
        (1, 8, 8, [6, 8, 32], 3, [1, 1, 1]),
        (2, 5, 3, [5, 7, 17], 3, [1, 1, 1]),
        (1, 20, 19, [4, 5, 16], 3, [1, 1, 1]),
        (3, 4, 9, [4, 4, 6], 3, [1, 1, 1]),
        (1, 3, 4, [3, 3, 1], 1, [0, 0, 0]),
        (1, 3, 4, [1, 1, 1], 3, [1, 1, 1]),
        (1, 2, 4, [3, 4, 40], 5, [2, 0, 3]),
        (2, 33, 2, [5, 2, 24], 2, [0, 3, 4]),
    ],
)
def test_it_is_the_direct_convolution(batch, inputs, outputs, sizes, columns, padding) -> None:
    input, weight, bias = arguments(batch, inputs, outputs, sizes, columns)
    assert (
        error(winograd_conv3d(input, weight, bias, padding=padding), input, weight, bias, padding).abs().max()
        < 5e-6
    )
    assert (
        error(winograd_conv3d(input, weight, padding=padding), input, weight, None, padding).abs().max()
        < 5e-6
    )


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_geometry(data: st.DataObject) -> None:
    columns = data.draw(st.integers(1, 4))
    padding = [data.draw(st.integers(0, 3)) for _ in range(3)]
    least = [max(1, kernel - 2 * pad) for kernel, pad in zip((3, 3, columns), padding, strict=True)]
    sizes = [data.draw(st.integers(low, low + most)) for low, most in zip(least, (5, 5, 40), strict=True)]
    batch, inputs, outputs = (data.draw(st.integers(1, most)) for most in (2, 20, 20))
    input, weight, bias = arguments(batch, inputs, outputs, sizes, columns)
    result = winograd_conv3d(input, weight, bias, padding=padding)
    assert error(result, input, weight, bias, padding).abs().max() < 5e-6


@pytest.mark.parametrize("shape", [(5, 7, 3), (16, 33, 3), (3, 9, 1), (8, 4, 5)])
def test_a_mirrored_weight_is_that_of_the_gradient(shape) -> None:
    inputs, outputs, columns = shape
    grad, weight, _ = arguments(2, outputs, inputs, [6, 7, 18], columns)
    mirrored = weight.transpose(0, 1).flip(2, 3, 4).contiguous()
    padding = [1, 1, columns // 2]
    expected = winograd_conv3d(grad, weight, padding=padding)
    assert torch.equal(winograd_conv3d(grad, mirrored, padding=padding, mirrored=True), expected)


@pytest.mark.parametrize("inputs", [8, 64])
def test_it_is_as_precise_as_the_direct_sum(inputs) -> None:
    input, weight, _ = arguments(1, inputs, 16, [16, 16, 16])
    winograd = error(winograd_conv3d(input, weight, padding=[1, 1, 1]), input, weight, None, [1, 1, 1])
    columns = torch.nn.functional.pad(input, (1,) * 6).unfold(2, 3, 1).unfold(3, 3, 1).unfold(4, 3, 1)
    direct = torch.einsum("bidhwxyz,oixyz->bodhw", columns, weight)
    assert winograd.square().mean() < 1.3 * error(direct, input, weight, None, [1, 1, 1]).square().mean()


def test_what_is_not_finite_stays_near() -> None:
    input, weight, bias = arguments(1, 2, 2, [8, 8, 16])
    clean = winograd_conv3d(input, weight, bias, padding=[1, 1, 1])
    input[0, 0, 4, 4, 8] = float("nan")
    result = winograd_conv3d(input, weight, bias, padding=[1, 1, 1])
    assert result[0, :, 3:6, 3:6, 7:10].isnan().all()
    far = torch.ones(8, 8, 16, dtype=torch.bool)
    far[2:7, 2:7, 7:10] = False
    assert torch.equal(result[0, :, far], clean[0, :, far])


def test_the_bits_do_not_depend_on_threads_or_strides() -> None:
    input, weight, bias = arguments(2, 12, 20, [9, 10, 33])
    expected = winograd_conv3d(input, weight, bias, padding=[1, 0, 1])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(winograd_conv3d(input, weight, bias, padding=[1, 0, 1]), expected)
    finally:
        torch.set_num_threads(threads)
    strided = (x.to(memory_format=torch.channels_last_3d) for x in (input, weight))
    assert torch.equal(winograd_conv3d(*strided, bias, padding=[1, 0, 1]), expected)


def test_an_empty_batch_has_an_empty_result() -> None:
    assert winograd_conv3d(*arguments(0, 3, 4, [4, 5, 6]), padding=[1, 1, 0]).shape == (0, 4, 4, 5, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(1, 2, 4, 4, 4).double()}, r"input must be float32 \(got float64\)"),
        ({"input": torch.zeros(2, 4, 4, 4)}, r"input must have 5 axes \(got \[2, 4, 4, 4\]\)"),
        ({"weight": torch.zeros(4, 3, 3, 3, 3)}, r"weight must be \[O, 2, 3, 3, K\] for input .*got \[4, 3,"),
        ({"weight": torch.zeros(4, 2, 3, 2, 3)}, r"weight must be \[O, 2, 3, 3, K\]"),
        ({"bias": torch.zeros(3)}, r"bias must be \[4\], contiguous \(got \[3\]\)"),
        ({"bias": torch.zeros(8)[::2]}, r"bias must be \[4\], contiguous"),
        ({"padding": [1, 1]}, r"padding must hold 3 numbers >= 0 \(got \[1, 1\]\)"),
        ({"padding": [1, -1, 1]}, r"padding must hold 3 numbers >= 0"),
        ({"input": torch.zeros(1, 2, 2, 4, 4)}, r"input with its padding must be at least as large"),
        (
            {"mirrored": True},
            r"weight must be \[2, O, 3, 3, K\], mirrored, for input .*got \[4, 2,",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, message) -> None:
    input, weight, bias = arguments(1, 2, 4, [4, 4, 4])
    call = {"input": input, "weight": weight, "bias": bias, "padding": [0, 0, 0]} | change
    with pytest.raises(RuntimeError, match="winograd_conv3d: " + message):
        winograd_conv3d(**call)
