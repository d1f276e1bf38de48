"""`strided_conv3d_input_gradient` against autograd in float64, its bits, and the messages."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import conv3d

from timm_ext.ops.conv3d import strided_conv3d_input_gradient


def arguments(batch: int, outputs: int, inputs: int, size: list[int]) -> tuple[Tensor, Tensor, list[int]]:
    """grad, weight and size; results are of the order of one."""
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(batch, outputs, *((edge + 1) // 2 for edge in size), generator=generator)
    weight = torch.randn(outputs, inputs, 3, 3, 3, generator=generator) / (27 * outputs) ** 0.5
    return grad, weight, size


def by_autograd(grad: Tensor, weight: Tensor, size: list[int]) -> Tensor:
    x = torch.zeros(len(grad), weight.shape[1], *size, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(conv3d(x, weight.double(), stride=2, padding=1), x, grad.double())
    return gradient


def assert_exact(grad: Tensor, weight: Tensor, size: list[int]) -> None:
    expected = by_autograd(grad, weight, size)
    result = strided_conv3d_input_gradient(grad, weight, size)
    assert result.shape == expected.shape
    assert (result - expected).abs().max() < 5e-6


@pytest.mark.parametrize(
    ("batch", "outputs", "inputs", "size"),
    [
        (1, 32, 16, [32, 32, 32]),
        (2, 9, 7, [16, 8, 48]),
        (1, 300, 5, [4, 4, 4]),
        (1, 4, 8, [7, 9, 13]),
        (3, 3, 1, [1, 2, 3]),
        (1, 2, 2, [2, 3, 71]),
        (1, 1, 9, [9, 34, 33]),
    ],
)
def test_it_is_the_gradient(batch, outputs, inputs, size) -> None:
    assert_exact(*arguments(batch, outputs, inputs, size))


@settings(max_examples=40)
@given(st.data())
def test_any_size(data: st.DataObject) -> None:
    batch, outputs, inputs = (data.draw(st.integers(1, most)) for most in (2, 20, 20))
    size = [data.draw(st.integers(1, most)) for most in (9, 12, 40)]
    assert_exact(*arguments(batch, outputs, inputs, size))


def test_the_bits_do_not_depend_on_threads_or_strides() -> None:
    for size in ([12, 9, 34], [6, 4, 4]):
        grad, weight, _ = arguments(2, 12, 20, size)
        expected = strided_conv3d_input_gradient(grad, weight, size)
        threads = torch.get_num_threads()
        try:
            for count in (1, 2, 5, 16):
                torch.set_num_threads(count)
                assert torch.equal(strided_conv3d_input_gradient(grad, weight, size), expected)
        finally:
            torch.set_num_threads(threads)
        strided = (x.to(memory_format=torch.channels_last_3d) for x in (grad, weight))
        assert torch.equal(strided_conv3d_input_gradient(*strided, size), expected)


def test_an_empty_batch_has_an_empty_result() -> None:
    assert strided_conv3d_input_gradient(*arguments(0, 3, 4, [4, 5, 6])).shape == (0, 4, 4, 5, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.zeros(1, 4, 2, 2, 2).double()}, r"grad must be float32 \(got float64\)"),
        ({"grad": torch.zeros(4, 2, 2, 2)}, r"grad must have 5 axes \(got \[4, 2, 2, 2\]\)"),
        ({"weight": torch.zeros(3, 2, 3, 3, 3)}, r"weight must be \[4, I, 3, 3, 3\] for grad .*got \[3, 2,"),
        ({"weight": torch.zeros(4, 2, 3, 3, 1)}, r"weight must be \[4, I, 3, 3, 3\]"),
        ({"size": [4, 4]}, r"size must hold 3 numbers >= 1 \(got \[4, 4\]\)"),
        ({"size": [4, 0, 4]}, r"size must hold 3 numbers >= 1"),
        (
            {"size": [4, 4, 5]},
            r"grad must have half of size, rounded up, \[2, 2, 3\] \(got \[1, 4, 2, 2, 2\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, message) -> None:
    grad, weight, size = arguments(1, 4, 2, [4, 4, 4])
    with pytest.raises(RuntimeError, match="strided_conv3d_input_gradient: " + message):
        strided_conv3d_input_gradient(**{"grad": grad, "weight": weight, "size": size} | change)
