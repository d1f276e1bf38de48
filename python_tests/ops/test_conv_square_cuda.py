"""The squared weight gradients of convolutions on a GPU."""

import pytest
import torch
from conv_samples import case
from torch import Tensor
from torch.library import opcheck

import timm_ext
from timm_ext.ops import reference

pytestmark = pytest.mark.parametrize("device", ["cuda"], indirect=True)

CASES = {
    "one slice": (8, 8, [9, 10, 12], [3, 3, 3], {"padding": [1, 1, 1]}),
    "several tiles": (80, 40, [4, 4, 4], [3, 3, 3], {"padding": [1, 1, 1], "batch": 5}),
    "several slices": (16, 16, [32, 32, 32], [3, 3, 3], {"padding": [1, 1, 1], "batch": 3}),
    "strided": (32, 16, [31, 33, 32], [3, 3, 3], {"stride": [2, 2, 2], "padding": [1, 1, 1]}),
    "dilated": (5, 7, [20, 16, 18], [3, 3, 3], {"dilation": [2, 3, 2], "padding": [2, 3, 2]}),
    "grouped": (12, 8, [10, 10, 10], [3, 3, 3], {"groups": 4, "padding": [1, 1, 1]}),
    "two axes": (18, 10, [64, 65], [3, 3], {"padding": [1, 1]}),
    "one axis": (4, 3, [5000], [5], {"dilation": [3]}),
}


def on(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    return [tensor.to(device) for tensor in tensors]


def assert_close(got: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    assert float((got.cpu().double() - expected).abs().max() / expected.abs().max()) < relative


@pytest.mark.parametrize("name", CASES)
def test_squares_are_those_of_the_reference(device: torch.device, name: str) -> None:
    *sizes, options = CASES[name]
    acc, grad, input, geometry = case(*sizes, **options)
    expected = acc.double()
    reference.conv_weight_grad_square_(expected, grad.double(), input.double(), **geometry, scale=0.5)
    acc, grad, input = on(device, acc, grad, input)
    results = [acc.clone(), acc.clone()]
    for result in results:
        timm_ext.conv_weight_grad_square_(result, grad, input, **geometry, scale=0.5)
    assert_close(results[0], expected)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_summed_in_float32(device: torch.device, dtype: torch.dtype) -> None:
    acc, grad, input, geometry = case(16, 8, [20, 18, 16], [3, 3, 3], padding=[1, 1, 1])
    grad, input = grad.to(dtype), input.to(dtype)
    expected = acc.double()
    reference.conv_weight_grad_square_(expected, grad.double(), input.double(), **geometry)
    acc, grad, input = on(device, acc, grad, input)
    timm_ext.conv_weight_grad_square_(acc, grad, input, **geometry)
    assert_close(acc, expected)


def test_long_sums_of_one_sign_keep_their_precision(device: torch.device) -> None:
    acc, grad, input, geometry = case(4, 4, [96, 96, 96], [3, 3, 3], padding=[1, 1, 1], batch=1)
    grad, input = grad.abs(), input.abs()
    expected = acc.double().zero_()
    reference.conv_weight_grad_square_(expected, grad.double(), input.double(), **geometry)
    acc, grad, input = on(device, acc.zero_(), grad, input)
    timm_ext.conv_weight_grad_square_(acc, grad, input, **geometry)
    assert_close(acc, expected)


def test_the_sum_of_an_example_does_not_depend_on_the_batch(device: torch.device) -> None:
    acc, grad, input, geometry = case(16, 8, [16, 16, 16], [3, 3, 3], padding=[1, 1, 1], batch=3)
    acc, grad, input = on(device, acc.zero_(), grad, input)
    grad[1:] = 0
    alone = acc.clone()
    timm_ext.conv_weight_grad_square_(acc, grad, input, **geometry)
    timm_ext.conv_weight_grad_square_(alone, grad[:1], input[:1], **geometry)
    assert torch.equal(acc, alone)


def test_opcheck(device: torch.device) -> None:
    acc, grad, input, geometry = case(4, 2, [5, 5], [3, 3], padding=[1, 1])
    arguments = (*on(device, acc, grad, input), *geometry.values(), 1.0)
    opcheck(torch.ops.timm_ext.conv_weight_grad_square_.default, arguments)


def test_replays_from_a_graph_with_other_inputs(device: torch.device) -> None:
    acc, grad, input, geometry = case(16, 16, [16, 16, 16], [3, 3, 3], padding=[1, 1, 1])
    acc, grad, input = on(device, acc, grad, input)
    start = acc.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        timm_ext.conv_weight_grad_square_(acc, grad, input, **geometry)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        timm_ext.conv_weight_grad_square_(acc, grad, input, **geometry)
    acc.copy_(start)
    grad.copy_(torch.randn_like(grad))
    graph.replay()
    timm_ext.conv_weight_grad_square_(start, grad, input, **geometry)
    assert torch.equal(acc, start)


def test_runs_on_the_current_stream_without_waiting(device: torch.device) -> None:
    acc, grad, input, geometry = case(16, 16, [16, 16, 16], [3, 3, 3], padding=[1, 1, 1])
    acc, grad, input = on(device, acc, grad, input)
    expected, late = acc.clone(), torch.zeros_like(grad)
    timm_ext.conv_weight_grad_square_(expected, grad, input, **geometry)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")  # a wait raises
    try:
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            late.copy_(grad)
            timm_ext.conv_weight_grad_square_(acc, late, input, **geometry)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(acc, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_inputs(device: torch.device) -> None:
    acc, grad, input, geometry = case(16, 16, [16, 16, 16], [3, 3, 3], padding=[1, 1, 1])
    here, there = on(device, acc, grad, input), on(torch.device("cuda:1"), acc, grad, input)
    with torch.cuda.device(0):
        timm_ext.conv_weight_grad_square_(*there, **geometry)
    timm_ext.conv_weight_grad_square_(*here, **geometry)
    assert torch.equal(there[0].cpu(), here[0].cpu())


def test_refuses_what_it_does_not_take(device: torch.device) -> None:
    acc, grad, input, geometry = case(4, 2, [5, 5], [3, 3])
    acc, grad, input = on(device, acc, grad, input)
    with pytest.raises(RuntimeError, match=r"grad must be float32, bfloat16 or float16 \(got float64\)"):
        timm_ext.conv_weight_grad_square_(acc, grad.double(), input.double(), **geometry)
    with pytest.raises(RuntimeError, match=r"input must be bfloat16 like grad \(got float32\)"):
        timm_ext.conv_weight_grad_square_(acc, grad.bfloat16(), input, **geometry)
    with pytest.raises(RuntimeError, match=r"input must be on the device of acc"):
        timm_ext.conv_weight_grad_square_(acc, grad, input.cpu(), **geometry)
