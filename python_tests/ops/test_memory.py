"""Memory that is kept for the next results: the same values, nothing left over."""

import sys
import threading

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from timm_ext import FisherAccumulator
from timm_ext.ops.conv3d import winograd_conv3d
from timm_ext.ops.memory import kept_bytes, kept_memory, new_tensor, release_memory
from timm_ext.ops.norm import group_norm

MEBIBYTE = 1 << 20
KEEPS = sys.platform == "linux" and tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
keeps = pytest.mark.skipif(not KEEPS, reason="memory is kept on Linux with PyTorch 2.11 or newer")


def convolved() -> Tensor:
    """Something of 2 MiB from operators of this package."""
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(1, 4, 32, 32, 32, generator=generator)
    weight = torch.randn(16, 4, 3, 3, 3, generator=generator)
    convolved = winograd_conv3d(input, weight, padding=(1, 1, 1))
    return group_norm(convolved, groups=convolved.shape[1])[0]


def left_after_release() -> int:
    """Bytes that results are in."""
    release_memory()
    return kept_bytes()


@keeps
def test_memory_is_kept_for_the_next_results() -> None:
    assert left_after_release() == 0
    with kept_memory():
        convolved()
        first = kept_bytes()
        assert first >= 4 * MEBIBYTE
        for _ in range(5):
            convolved()
        assert kept_bytes() == first
        with kept_memory():
            pass
        convolved()
        assert kept_bytes() == first
    with kept_memory():
        convolved()
        assert kept_bytes() == first
    assert left_after_release() == 0
    with kept_memory():
        convolved()
        assert kept_bytes() == first


@keeps
def test_what_is_made_outside_does_not_come_from_kept_memory() -> None:
    release_memory()
    convolved()
    assert kept_bytes() == 0


def test_results_are_the_same_and_outlive_the_context() -> None:
    expected = convolved()
    with kept_memory():
        result = convolved()
        other = convolved().clone()
    assert torch.equal(result, expected)
    assert torch.equal(other, expected)
    part = result[0, 3]
    del result
    assert torch.equal(part, expected[0, 3])
    assert not KEEPS or 2 * MEBIBYTE <= left_after_release() < 3 * MEBIBYTE
    assert torch.equal(part, expected[0, 3])
    del part
    assert left_after_release() == 0


def test_an_error_ends_the_context() -> None:
    def fail() -> None:
        with kept_memory():
            convolved()
            raise ValueError("on the way")

    with pytest.raises(ValueError, match="on the way"):
        fail()
    assert left_after_release() == 0
    convolved()
    assert kept_bytes() == 0


def test_results_of_threads_do_not_meet() -> None:
    expected, wrong = convolved(), []

    def work() -> None:
        for _ in range(10):
            one, other = convolved(), convolved()
            if not (torch.equal(one, expected) and torch.equal(other, expected)):
                wrong.append(threading.get_ident())

    with kept_memory():
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert left_after_release() == 0


def test_gradients_flow_through_kept_memory() -> None:
    with kept_memory():
        x = new_tensor(torch.zeros(()), (512, 1024)).fill_(2).requires_grad_()
        y = (x * x).sum()
        y.backward()
    assert x.grad is not None
    assert bool((x.grad == 4).all())


@keeps
def test_a_fisher_keeps_memory_until_its_result() -> None:
    model = nn.Sequential(
        nn.Conv3d(2, 16, 3, padding=1), nn.InstanceNorm3d(16, affine=True), nn.Conv3d(16, 1, 1)
    )
    with FisherAccumulator(model) as accumulator:
        accumulator.update(torch.randn(2, 2, 16, 16, 16), None, ["a", "b"])
        held = kept_bytes()
        accumulator.update(torch.randn(2, 2, 16, 16, 16), None, ["c", "d"])
        assert kept_bytes() == held > 0
    assert kept_bytes() == held
    accumulator.result()
    assert kept_bytes() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("sizes", [(), (3,), (0, 5), (2, 3, 4), (64, 33, 65)], ids=str)
def test_new_tensor(sizes, dtype) -> None:
    with kept_memory():
        tensor = new_tensor(torch.zeros(2, dtype=dtype), sizes)
        assert tensor.shape == sizes
        assert tensor.dtype == dtype
        assert tensor.device.type == "cpu"
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0
        tensor.fill_(3)
        assert bool((tensor == 3).all())


def test_new_tensor_in_a_fake_mode() -> None:
    with FakeTensorMode():
        assert new_tensor(torch.zeros(1), (512, 1024)).shape == (512, 1024)


@pytest.mark.parametrize("sizes", [(-1, 4), (2**40, 2**40)], ids=str)
def test_sizes_that_cannot_be(sizes) -> None:
    with kept_memory(), pytest.raises(RuntimeError, match=r"there is memory on cpu \(got \["):
        new_tensor(torch.zeros(1), sizes)
