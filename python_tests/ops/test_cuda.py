"""What only a GPU shows: streams, graphs, devices and more elements than 32 bits count."""

import pytest
import torch
from torch import Tensor

import timm_ext

pytestmark = pytest.mark.parametrize("device", ["cuda"], indirect=True)
LENGTHS = (3, 70_000, 27, 40, 5_000)


def draw(device: torch.device, models: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """θ, F, logits, offsets and a gradient."""
    elements = sum(LENGTHS)
    theta = torch.randn(models, elements, device=device)
    fisher = torch.rand(models, elements, device=device)
    logits = torch.randn(len(LENGTHS), models, device=device, requires_grad=True)
    offsets = torch.tensor([0, *LENGTHS], device=device).cumsum(0)
    return theta, fisher, logits, offsets, torch.randn(elements, device=device)


def step(
    theta: Tensor, fisher: Tensor, logits: Tensor, offsets: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    merged = timm_ext.fused_merge(theta, fisher, logits, offsets)
    (grad_logits,) = torch.autograd.grad(merged, logits, gradient)
    return merged, grad_logits


def test_replays_from_a_graph_with_other_logits(device: torch.device) -> None:
    theta, fisher, logits, offsets, gradient = draw(device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(theta, fisher, logits, offsets, gradient)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        merged, grad_logits = step(theta, fisher, logits, offsets, gradient)
    with torch.no_grad():
        logits.copy_(torch.randn_like(logits))
    graph.replay()
    expected_merged, expected_grad = step(theta, fisher, logits, offsets, gradient)
    assert torch.equal(merged, expected_merged)
    assert torch.equal(grad_logits, expected_grad)


def test_never_waits_for_the_device(device: torch.device) -> None:
    inputs = draw(device)
    torch.cuda.set_sync_debug_mode("error")  # a wait raises
    try:
        merged, _ = step(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert merged.isfinite().all()


def test_runs_on_the_current_stream(device: torch.device) -> None:
    theta, fisher, logits, offsets, gradient = draw(device)
    expected = step(theta, fisher, logits, offsets, gradient)
    late = torch.zeros_like(theta)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late.copy_(theta)
        merged, grad_logits = step(late, fisher, logits, offsets, gradient)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(merged, expected[0])
    assert torch.equal(grad_logits, expected[1])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_inputs(device: torch.device) -> None:
    inputs = draw(device)
    there = [tensor.detach().to("cuda:1") for tensor in inputs]
    there[2].requires_grad_()
    with torch.cuda.device(0):
        results = step(*there)
    for result, expected in zip(results, step(*inputs), strict=True):
        assert result.device.index == 1
        assert torch.equal(result.to(device), expected)


@pytest.mark.slow
def test_more_elements_than_32_bits_count(device: torch.device) -> None:
    elements = 2**31 + 300
    if torch.cuda.mem_get_info()[0] < 9 * elements:
        pytest.skip("needs 19 GB of GPU memory")
    theta = torch.zeros(2, elements, dtype=torch.bfloat16, device=device)
    theta[0, -200:] = 1
    offsets = torch.tensor([0, elements - 100, elements], device=device)
    logits = torch.tensor([[0.0, 0.0], [30.0, -30.0]], device=device, requires_grad=True)
    merged = timm_ext.fused_merge(theta, None, logits, offsets)
    assert merged[-300:].tolist() == [0.0] * 100 + [0.5] * 100 + [1.0] * 100
    (grad,) = torch.autograd.grad(merged, logits, torch.ones_like(merged))
    # c_1 = 100 · ½ · ½ over the first segment, times the slope ½ of log σ at 0.
    assert torch.allclose(grad[0], torch.tensor([12.5, -12.5], device=device))
