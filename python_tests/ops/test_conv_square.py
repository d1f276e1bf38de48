"""The squared weight gradients of convolutions against their definition, and the messages."""

import pytest
import torch
from conv_samples import case
from hypothesis import given, settings
from hypothesis import strategies as st

import timm_ext
from timm_ext.ops import reference


def assert_close_to_reference(acc, grad, input, geometry, scale=1.0) -> None:
    expected = acc.double()
    reference.conv_weight_grad_square_(expected, grad.double(), input.double(), **geometry, scale=scale)
    timm_ext.conv_weight_grad_square_(acc, grad, input, **geometry, scale=scale)
    error = (acc.double() - expected).abs().max() / expected.abs().max()
    assert float(error) < 2e-6


@pytest.mark.parametrize(
    ("outputs", "inputs", "sizes", "kernel", "options"),
    [
        (8, 8, [9, 10, 11], [3, 3, 3], {"padding": [1, 1, 1]}),
        (16, 4, [6, 5, 7], [3, 3, 3], {"padding": [1, 1, 1], "batch": 3}),
        (33, 17, [4, 4, 4], [3, 3, 3], {"padding": [1, 1, 1]}),
        (40, 24, [2, 2, 2], [3, 3, 3], {"padding": [1, 1, 1], "batch": 5}),
        (3, 7, [8, 9, 8], [3, 3, 3], {"stride": [2, 2, 2], "padding": [1, 1, 1]}),
        (20, 9, [9, 7, 8], [3, 2, 1], {"stride": [1, 2, 3], "padding": [2, 0, 1], "dilation": [2, 1, 1]}),
        (6, 6, [7, 7, 7], [1, 1, 1], {"stride": [2, 2, 2]}),
        (12, 8, [6, 6, 6], [3, 3, 3], {"groups": 4}),
        (5, 5, [5, 5, 5], [2, 2, 2], {"groups": 5, "padding": [1, 1, 1]}),
        (18, 10, [12, 13], [3, 3], {"padding": [1, 1]}),
        (20, 18, [12, 13], [3, 3], {"padding": [1, 1]}),
        (16, 33, [9, 7, 20], [3, 3, 3], {"padding": [1, 1, 1]}),
        (48, 17, [3, 9, 40], [1, 3, 3], {"padding": [0, 2, 0], "dilation": [2, 1, 1]}),
        (32, 64, [10, 11, 8], [3, 3, 3], {"groups": 2, "batch": 3}),
        (17, 9, [6, 9, 16], [3, 3, 3], {"padding": [0, 2, 1], "dilation": [2, 1, 1]}),
        (8, 13, [5, 7, 18], [2, 3, 3], {"stride": [2, 1, 1], "padding": [1, 1, 0], "batch": 1}),
        (1, 1, [50], [5], {"dilation": [3]}),
        (2, 3, [1, 1, 40], [1, 1, 3], {}),
        (3, 2, [5, 5, 5], [5, 5, 5], {}),
    ],
)
def test_squares_are_those_of_the_reference(outputs, inputs, sizes, kernel, options) -> None:
    assert_close_to_reference(*case(outputs, inputs, sizes, kernel, **options))


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(
    ("outputs", "inputs", "sizes", "kernel", "options"),
    [
        (19, 37, [2, 2, 2], [3, 3, 3], {"padding": [1, 1, 1]}),
        (8, 16, [4, 4, 4], [3, 3, 3], {"padding": [1, 1, 1], "stride": [2, 2, 2]}),
        (10, 6, [3, 2, 5], [2, 1, 3], {"padding": [1, 0, 2], "dilation": [2, 1, 2], "groups": 2}),
        (7, 300, [2, 3, 1], [3, 3, 3], {"padding": [1, 1, 1]}),
        (5, 3, [1, 1, 1], [1, 1, 1], {}),
    ],
)
def test_few_points(outputs, inputs, sizes, kernel, options, batch) -> None:
    assert_close_to_reference(*case(outputs, inputs, sizes, kernel, batch=batch, **options))


@settings(max_examples=40)
@given(st.data())
def test_any_geometry(data: st.DataObject) -> None:
    axes = data.draw(st.integers(1, 3))
    groups = data.draw(st.integers(1, 3))
    numbers = st.lists(st.integers(1, 3), min_size=axes, max_size=axes)
    kernel, stride, dilation = data.draw(numbers), data.draw(numbers), data.draw(numbers)
    padding = data.draw(st.lists(st.integers(0, 2), min_size=axes, max_size=axes))
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    sizes = [data.draw(st.integers(max(1, r - 2 * p), 9)) for r, p in zip(reach, padding, strict=True)]
    outputs, inputs = (data.draw(st.integers(1, 20)) * groups for _ in range(2))
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    assert_close_to_reference(*case(outputs, inputs, sizes, kernel, **options))


def test_a_long_sum_keeps_its_precision() -> None:
    acc, grad, input, geometry = case(4, 4, [48, 48, 48], [3, 3, 3], padding=[1, 1, 1], batch=1)
    acc.zero_()
    assert_close_to_reference(acc, grad.abs(), input.abs(), geometry, scale=1e-6)


def test_a_transposed_convolution_exchanges_grad_and_input() -> None:
    layer = torch.nn.ConvTranspose3d(6, 10, 3, stride=2, padding=1, groups=2).double()
    input = torch.randn(3, 6, 4, 5, 3)
    grad = torch.randn_like(layer(input.double())).float()
    expected = torch.zeros_like(layer.weight)
    for x, g in zip(input.double().split(1), grad.double().split(1), strict=True):
        expected += torch.autograd.grad(layer(x), layer.weight, g)[0].square()
    acc = torch.zeros(layer.weight.shape)
    timm_ext.conv_weight_grad_square_(
        acc, input, grad, stride=[2] * 3, padding=[1] * 3, dilation=[1] * 3, groups=2
    )
    torch.testing.assert_close(acc.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.max()))


def test_the_bits_do_not_depend_on_threads() -> None:
    acc, grad, input, geometry = case(24, 20, [10, 11, 12], [3, 3, 3], padding=[1, 1, 1])
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(acc.clone())
            timm_ext.conv_weight_grad_square_(results[-1], grad, input, **geometry)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_strided_inputs_and_versions() -> None:
    acc, grad, input, geometry = case(8, 8, [6, 6, 6], [3, 3, 3])
    expected = acc.clone()
    timm_ext.conv_weight_grad_square_(expected, grad, input, **geometry)
    version = acc._version
    last = (x.to(memory_format=torch.channels_last_3d) for x in (grad, input))
    timm_ext.conv_weight_grad_square_(acc, *last, **geometry)
    assert torch.equal(acc, expected)
    assert acc._version > version


def test_an_empty_batch_adds_nothing() -> None:
    acc, grad, input, geometry = case(4, 2, [5, 5], [3, 3], batch=0)
    before = acc.clone()
    timm_ext.conv_weight_grad_square_(acc, grad, input, **geometry)
    assert torch.equal(acc, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": [1]}, r"stride must hold 2 numbers >= 1 \(got \[1\]\)"),
        ({"dilation": [0, 1]}, r"dilation must hold 2 numbers >= 1 \(got \[0, 1\]\)"),
        ({"padding": [-1, 0]}, r"padding must hold 2 numbers >= 0 \(got \[-1, 0\]\)"),
        ({"groups": 3}, r"groups must divide the channels of grad, 4 \(got 3\)"),
        ({"groups": 2}, r"acc, grad and input must be .* in 2 groups"),
        ({"stride": [2, 2]}, r"grad must have no larger sizes than the output"),
        ({"acc": torch.zeros(4, 2, 3, 3, dtype=torch.float64)}, r"acc must be float32 \(got float64\)"),
        ({"acc": torch.zeros(4, 2, 3, 6)[..., ::2]}, r"acc must be .* contiguous"),
        (
            {"grad": torch.zeros(2, 4, 3, 3, dtype=torch.bfloat16)},
            r"grad must be float32 on the CPU \(got bf",
        ),
        ({"input": torch.zeros(2, 2, 5, 5).double()}, r"input must be float32 like grad \(got float64\)"),
        ({"input": torch.zeros(2, 2, 5)}, r"input must have as many axes as acc, 4"),
    ],
)
def test_what_does_not_fit_is_refused(change, message) -> None:
    acc, grad, input, geometry = case(4, 2, [5, 5], [3, 3])
    tensors = {"acc": acc, "grad": grad, "input": input}
    arguments = tensors | geometry | change
    with pytest.raises(RuntimeError, match=r"conv_weight_grad_square_: " + message):
        timm_ext.conv_weight_grad_square_(**arguments)
    assert torch.equal(acc, tensors["acc"])
