"""`conv3d_weight_gradient` against its twin in float64, its bits, the messages."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from timm_ext.ops import reference
from timm_ext.ops.conv3d import conv3d_weight_gradient

ONES = [1, 1, 1]
GEOMETRY = {"stride": ONES, "padding": ONES, "dilation": ONES}
MOST = 1e-6  # of float64's norm


def arguments(batch: int, outputs: int, inputs: int, points: list[int], sizes: list[int]) -> list[Tensor]:
    """grad and input."""
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, outputs, *points), (batch, inputs, *sizes)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def check(grad: Tensor, input: Tensor, kernel: list[int], **geometry: object) -> None:
    found = conv3d_weight_gradient(grad, input, kernel, **geometry)
    expected = reference.conv3d_weight_gradient(grad.double(), input.double(), kernel, **geometry)
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    assert (found - expected).norm() <= MOST * expected.norm()


@pytest.mark.parametrize(
    ("batch", "outputs", "inputs", "sizes"),
    [
        (2, 16, 16, [32, 32, 32]),  # forms in several slabs, one vector of outputs
        (2, 40, 17, [32, 7, 20]),  # likewise, of more than one block of channels
        (5, 130, 70, [6, 6, 7]),  # slabs of several examples
        (2, 12, 20, [20, 18, 21]),  # pairs of planes and rows
        (3, 8, 4, [16, 17, 18]),  # halves
        (2, 40, 33, [6, 6, 6]),
        (1, 3, 5, [5, 9, 4]),  # no forms
        (2, 33, 17, [2, 2, 2]),  # few points
        (2, 9, 3, [1, 1, 1]),
    ],
)
def test_it_is_the_gradient(batch, outputs, inputs, sizes) -> None:
    check(*arguments(batch, outputs, inputs, sizes, sizes), [3, 3, 3], **GEOMETRY)


@pytest.mark.parametrize(
    ("kernel", "padding", "sizes", "points"),
    [
        ([1, 3, 3], [0, 1, 1], [5, 16, 17], [5, 16, 17]),
        ([1, 3, 3], [0, 0, 3], [1, 9, 6], [1, 7, 10]),
        ([3, 3, 3], [0, 2, 5], [8, 4, 2], [6, 6, 10]),
    ],
)
def test_forms_of_other_kernels_and_paddings(kernel, padding, sizes, points) -> None:
    check(*arguments(2, 19, 36, points, sizes), kernel, **GEOMETRY | {"padding": padding})


def test_a_gradient_of_smaller_sizes_than_the_output_is_zero_beyond() -> None:
    grad, input = arguments(2, 19, 36, [11, 12, 6], [12, 12, 12])
    whole = torch.nn.functional.pad(grad, (0, 6, 0, 0, 0, 1)).double()
    expected = reference.conv3d_weight_gradient(whole, input.double(), [3, 3, 3], **GEOMETRY)
    found = conv3d_weight_gradient(grad, input, [3, 3, 3], **GEOMETRY)
    assert (found - expected).norm() <= MOST * expected.norm()


def test_more_examples_than_are_packed_together() -> None:
    """The sums of each part of the batch are added to what is there."""
    check(*arguments(90, 16, 16, [12, 12, 4], [12, 12, 4]), [3, 3, 3], **GEOMETRY)
    check(*arguments(70, 32, 32, [16, 16, 16], [16, 16, 16]), [1, 1, 1], **GEOMETRY | {"padding": [0, 0, 0]})


@settings(max_examples=60)
@given(st.data())
def test_any_geometry(data: st.DataObject) -> None:
    kernel, padding, dilation, stride, more = (
        [data.draw(st.integers(low, high)) for _ in range(3)]
        for low, high in ((1, 4), (0, 3), (1, 2), (1, 3), (0, 5))
    )
    reach = [gap * (size - 1) + 1 for gap, size in zip(dilation, kernel, strict=True)]
    sizes = [max(1, far - 2 * pad) + extra for far, pad, extra in zip(reach, padding, more, strict=True)]
    axes = zip(sizes, padding, reach, stride, strict=True)
    points = [(size + 2 * pad - far) // step + 1 for size, pad, far, step in axes]
    groups, batch = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    outputs, inputs = (groups * data.draw(st.integers(1, 20)) for _ in range(2))
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    check(*arguments(batch, outputs, inputs, points, sizes), kernel, **geometry)


@pytest.mark.parametrize("inputs", [9, 18])
@pytest.mark.parametrize("sizes", [[16, 16, 16], [2, 2, 3], [5, 5, 9]])
def test_the_bits_do_not_depend_on_threads_or_strides(sizes: list[int], inputs: int) -> None:
    grad, input = arguments(3, 20, inputs, sizes, sizes)
    expected = conv3d_weight_gradient(grad, input, [3, 3, 3], **GEOMETRY)
    strided = [x.to(memory_format=torch.channels_last_3d) for x in (grad, input)]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for g, x in ((grad, input), strided):
                assert torch.equal(conv3d_weight_gradient(g, x, [3, 3, 3], **GEOMETRY), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(0, 2, 4, 4, 4), (2, 0, 4, 4, 4), (2, 2, 0, 4, 4)], ids=str)
def test_of_nothing_it_is_zero(shape: tuple[int, ...]) -> None:
    volume = torch.empty(shape)
    result = conv3d_weight_gradient(volume, volume, [3, 3, 3], **GEOMETRY)
    assert result.shape == (shape[1], shape[1], 3, 3, 3)
    assert not result.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"input": torch.zeros(1, 2, 4, 4, 4).double()},
            r"input must be float32 or bfloat16 \(got float64\)",
        ),
        ({"grad": torch.zeros(1, 3, 4, 4, 4).half()}, r"grad must be float32 like input \(got float16\)"),
        ({"input": torch.zeros(2, 4, 4, 4)}, r"input must have 5 axes \(got \[2, 4, 4, 4\]\)"),
        ({"grad": torch.zeros(3, 4, 4, 4)}, r"grad must have 5 axes"),
        (
            {"grad": torch.zeros(2, 3, 4, 4, 4)},
            r"grad and input must be \[B, O, \.\.\.\] and \[B, I, \.\.\.\] \(got",
        ),
        ({"grad": torch.zeros(1, 3, 4, 4, 5)}, r"grad must have no larger sizes than the output \(got"),
        ({"kernel": [3, 3]}, r"kernel must hold 3 numbers >= 1 \(got \[3, 3\]\)"),
        ({"kernel": [3, 0, 3]}, r"kernel must hold 3 numbers >= 1"),
        ({"padding": [1, -1, 1]}, r"padding must hold 3 numbers >= 0"),
        ({"stride": [1, 0, 1]}, r"stride must hold 3 numbers >= 1 \(got \[1, 0, 1\]\)"),
        ({"dilation": [1, 1, 1, 1]}, r"dilation must hold 3 numbers >= 1"),
        ({"groups": 2}, r"groups must divide the channels of grad and input, 3 and 2 \(got 2\)"),
    ],
)
@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_what_does_not_fit_is_refused(change, message, place) -> None:
    grad, input = arguments(1, 3, 2, [4, 4, 4], [4, 4, 4])
    call = {"grad": grad, "input": input, "kernel": [3, 3, 3], **GEOMETRY} | change
    call |= {name: call[name].to(place) for name in ("grad", "input")}
    with pytest.raises(RuntimeError, match="conv3d_weight_gradient: " + message):
        conv3d_weight_gradient(**call)
