"""`winograd_conv3d` against the direct convolution in float64, its precision, and the messages."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import conv3d

from timm_ext.ops.conv3d import winograd_conv3d


def arguments(
    batch: int, inputs: int, outputs: int, sizes: list[int], columns: int = 3, planes: int = 3, rows: int = 3
) -> list[Tensor]:
    """input, weight and bias drawn at random; outputs are of the order of one."""
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, inputs, *sizes), (outputs, inputs, planes, rows, columns), (outputs,)
    input, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    return [input, weight / (rows * planes * columns * inputs) ** 0.5, bias]


def error(result: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int]) -> Tensor:
    wide = (tensor if tensor is None else tensor.double() for tensor in (input, weight, bias))
    expected = conv3d(*wide, padding=padding)
    assert result.shape == expected.shape
    return result.double() - expected


@pytest.mark.parametrize(
    ("batch", "inputs", "outputs", "sizes", "columns", "padding"),
    [
        (1, 5, 9, [8, 7, 40], 3, [1, 1, 1]),
        (2, 6, 8, [4, 9, 20], 3, [1, 1, 1]),
        (3, 70, 9, [6, 3, 10], 3, [1, 1, 1]),
        (2, 5, 130, [7, 8, 8], 3, [1, 1, 1]),
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


@settings(max_examples=40)
@given(st.data())
def test_any_geometry(data: st.DataObject) -> None:
    planes, columns = data.draw(st.sampled_from([1, 3])), data.draw(st.integers(1, 4))
    padding = [data.draw(st.integers(0, 3)) for _ in range(3)]
    least = [max(1, kernel - 2 * pad) for kernel, pad in zip((planes, 3, columns), padding, strict=True)]
    sizes = [data.draw(st.integers(low, low + most)) for low, most in zip(least, (9, 9, 40), strict=True)]
    batch, inputs, outputs = (data.draw(st.integers(1, most)) for most in (2, 20, 20))
    input, weight, bias = arguments(batch, inputs, outputs, sizes, columns, planes)
    result = winograd_conv3d(input, weight, bias, padding=padding)
    assert error(result, input, weight, bias, padding).abs().max() < 1e-5


@pytest.mark.parametrize(
    "shape", [(5, 7, 3, 3), (16, 33, 3, 3), (3, 9, 1, 3), (8, 4, 5, 3), (8, 4, 3, 1), (3, 5, 1, 1)]
)
def test_a_mirrored_weight_is_that_of_the_gradient(shape) -> None:
    inputs, outputs, columns, planes = shape
    grad, weight, _ = arguments(2, outputs, inputs, [6, 7, 18], columns, planes)
    mirrored = weight.transpose(0, 1).flip(2, 3, 4).contiguous()
    padding = [planes // 2, 1, columns // 2]
    expected = winograd_conv3d(grad, weight, padding=padding)
    assert torch.equal(winograd_conv3d(grad, mirrored, padding=padding, mirrored=True), expected)


@pytest.mark.parametrize("inputs", [8, 64])
def test_pairs_are_as_precise_as_the_direct_sum(inputs) -> None:
    """Of 6 planes and rows, F(2, 3)."""
    input, weight, _ = arguments(4, inputs, 16, [8, 8, 32])
    winograd = error(winograd_conv3d(input, weight, padding=[0, 0, 1]), input, weight, None, [0, 0, 1])
    columns = torch.nn.functional.pad(input, (1, 1)).unfold(2, 3, 1).unfold(3, 3, 1).unfold(4, 3, 1)
    direct = torch.einsum("bidhwxyz,oixyz->bodhw", columns, weight)
    assert winograd.square().mean() < 1.3 * error(direct, input, weight, None, [0, 0, 1]).square().mean()


@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("inputs", [4, 32, 320])
def test_the_error_is_small(inputs, rectified) -> None:
    """F(4, 3) on both axes: four times the error of PyTorch's sums at most."""
    input, weight, _ = arguments(1, inputs, 16, [16, 16, 16])
    input = input.relu() if rectified else input
    expected = conv3d(input.double(), weight.double(), padding=1)
    for mirrored in (False, True):
        taken = weight.transpose(0, 1).flip(2, 3, 4) if mirrored else weight
        result = winograd_conv3d(input, taken, padding=[1, 1, 1], mirrored=mirrored)
        assert (result - expected).norm() < 1e-6 * expected.norm()
        plain = (conv3d(input, weight, padding=1) - expected).norm()
        assert (result - expected).norm() < 4 * plain


def test_what_is_not_finite_stays_near() -> None:
    """In its tile of planes and rows, and beside it in columns."""
    input, weight, bias = arguments(1, 2, 2, [16, 16, 16])
    clean = winograd_conv3d(input, weight, bias, padding=[1, 1, 1])
    input[0, 0, 9, 9, 8] = float("nan")
    result = winograd_conv3d(input, weight, bias, padding=[1, 1, 1])
    assert result[0, :, 8:11, 8:11, 7:10].isnan().all()
    far = torch.ones(16, 16, 16, dtype=torch.bool)
    far[8:12, 8:12, 7:10] = False
    assert torch.equal(result[0, :, far], clean[0, :, far])


@pytest.mark.parametrize("sizes", [[9, 10, 33], [4, 6, 8], [5, 12, 10], [8, 8, 16]])
def test_the_bits_of_an_example_do_not_depend_on_the_batch(sizes) -> None:
    input, weight, bias = arguments(5, 40, 9, sizes)
    together = winograd_conv3d(input, weight, bias, padding=[1, 1, 1])
    alone = [winograd_conv3d(each[None], weight, bias, padding=[1, 1, 1]) for each in input]
    assert torch.equal(together, torch.cat(alone))


def test_an_output_that_no_cache_holds() -> None:
    input, weight, bias = arguments(1, 1, 9, [64, 65, 64])
    result = winograd_conv3d(input, weight, bias, padding=[1, 1, 1])
    assert error(result, input, weight, bias, [1, 1, 1]).abs().max() < 1e-5


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


@pytest.mark.parametrize(
    ("batch", "inputs", "outputs", "sizes", "planes", "columns", "padding"),
    [
        (2, 16, 16, [9, 8, 20], 5, 5, [2, 2, 2]),
        (1, 3, 9, [5, 7, 8], 5, 1, [0, 2, 0]),
        (2, 70, 8, [6, 6, 6], 5, 5, [2, 1, 4]),
        (2, 5, 8, [3, 11, 34], 1, 5, [0, 2, 2]),
    ],
)
def test_kernels_of_five_are_the_direct_convolution(
    batch, inputs, outputs, sizes, planes, columns, padding
) -> None:
    input, weight, bias = arguments(batch, inputs, outputs, sizes, columns, planes, 5)
    result = winograd_conv3d(input, weight, bias, padding=padding)
    off = error(result, input, weight, bias, padding)
    assert off.abs().max() < 5e-6
    assert off.norm() < 1.5e-6 * result.norm()
    turned = weight.transpose(0, 1).flip(2, 3, 4).contiguous()
    assert torch.equal(winograd_conv3d(input, turned, bias, padding=padding, mirrored=True), result)


def test_an_empty_batch_has_an_empty_result() -> None:
    assert winograd_conv3d(*arguments(0, 3, 4, [4, 5, 6]), padding=[1, 1, 0]).shape == (0, 4, 4, 5, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(1, 2, 4, 4, 4).double()}, r"input must be float32 \(got float64\)"),
        ({"input": torch.zeros(2, 4, 4, 4)}, r"input must have 5 axes \(got \[2, 4, 4, 4\]\)"),
        (
            {"weight": torch.zeros(4, 3, 3, 3, 3)},
            r"weight must be \[O, 2, 1 or R, R, K\] with R = 3 or 5 for input .*got \[4, 3,",
        ),
        ({"weight": torch.zeros(4, 2, 3, 2, 3)}, r"weight must be \[O, 2, 1 or R, R, K\] with R = 3 or 5"),
        ({"bias": torch.zeros(3)}, r"bias must be \[4\], contiguous \(got \[3\]\)"),
        ({"bias": torch.zeros(8)[::2]}, r"bias must be \[4\], contiguous"),
        ({"padding": [1, 1]}, r"padding must hold 3 numbers >= 0 \(got \[1, 1\]\)"),
        ({"padding": [1, -1, 1]}, r"padding must hold 3 numbers >= 0"),
        ({"input": torch.zeros(1, 2, 2, 4, 4)}, r"input with its padding must be at least as large"),
        (
            {"mirrored": True},
            r"weight must be \[2, O, 1 or R, R, K\] with R = 3 or 5, mirrored, for input .*got \[4, 2,",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, message) -> None:
    input, weight, bias = arguments(1, 2, 4, [4, 4, 4])
    call = {"input": input, "weight": weight, "bias": bias, "padding": [0, 0, 0]} | change
    with pytest.raises(RuntimeError, match="winograd_conv3d: " + message):
        winograd_conv3d(**call)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_stays_in_its_tiles(value: float) -> None:
    x, weight = torch.randn(1, 2, 20, 20, 20), torch.randn(3, 2, 3, 3, 3)
    finite = winograd_conv3d(x, weight, padding=(1, 1, 1))
    x[0, 1, 9, 10, 11] = value
    found = winograd_conv3d(x, weight, padding=(1, 1, 1))
    bad = ~found.isfinite()
    assert bad[0, :, 8:11, 9:12, 10:13].all()
    assert bad.nonzero().amin(0).tolist() == [0, 0, 8, 8, 10]
    assert bad.nonzero().amax(0).tolist() == [0, 2, 11, 11, 12]
    assert torch.equal(found[~bad], finite[~bad])
