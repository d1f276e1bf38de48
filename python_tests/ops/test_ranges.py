"""Integers of any size and tensors of size 0: the right result, or an error that names the argument.

On tensors without values (`meta`), which only the fake kernels see, in the same words as on the CPU.
"""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from math import prod

import pytest
import torch
from fuzz.operator_calls import check_on_meta, spoilt_call
from torch import Tensor

import timm_ext
from timm_ext.errors import InputError
from timm_ext.ops import conv3d as layer_ops
from timm_ext.ops import fisher as ops
from timm_ext.ops import norm as norm_ops
from timm_ext.ops import upsampled_conv3d as upsampled_ops
from timm_ext.ops.memory import kept_memory, new_tensor

LARGE = [2**31 - 1, 2**31, 2**32 + 1, 2**40, 2**61, 2**62, 2**62 + 1, 2**63 - 1]
ONES, NONE = (1, 1, 1), (0, 0, 0)
on_cpu_and_meta = pytest.mark.parametrize("place", ["cpu", "meta"])


def on_axes(value: int, axes: int, rest: int) -> list[int]:
    return [value] * axes + [rest] * (3 - axes)


def small(**changes: list[int]) -> Tensor:
    arguments = {"stride": ONES, "padding": NONE, "dilation": ONES, **changes}
    return layer_ops.small_conv3d(torch.ones(1, 2, 4, 4, 4), torch.ones(3, 2, 2, 2, 2), **arguments)


def winograd(**changes: list[int]) -> Tensor:
    return layer_ops.winograd_conv3d(torch.ones(1, 2, 4, 4, 4), torch.ones(3, 2, 3, 3, 3), **changes)


def square(**changes: object) -> Tensor:
    acc = torch.zeros(3, 2, 2, 2, 2)
    arguments: dict[str, object] = {"stride": ONES, "padding": NONE, "dilation": ONES, **changes}
    ops.conv_weight_grad_square_(acc, torch.ones(1, 3, 2, 2, 2), torch.ones(1, 2, 4, 4, 4), **arguments)
    return acc


def weight_gradient(**changes: object) -> Tensor:
    arguments: dict[str, object] = {"stride": ONES, "padding": NONE, "dilation": ONES, **changes}
    kernel = arguments.pop("kernel", [2, 2, 2])
    grad, input = torch.ones(1, 3, 2, 2, 2), torch.ones(1, 2, 4, 4, 4)
    return layer_ops.conv3d_weight_gradient(grad, input, kernel, **arguments)


CALLS: list[tuple[str, Callable[..., Tensor], str]] = [
    ("conv3d_weight_gradient", weight_gradient, "kernel"),
    ("conv3d_weight_gradient", weight_gradient, "stride"),
    ("conv3d_weight_gradient", weight_gradient, "padding"),
    ("conv3d_weight_gradient", weight_gradient, "dilation"),
    ("small_conv3d", small, "stride"),
    ("small_conv3d", small, "padding"),
    ("small_conv3d", small, "dilation"),
    ("winograd_conv3d", winograd, "padding"),
    ("conv_weight_grad_square_", square, "stride"),
    ("conv_weight_grad_square_", square, "padding"),
    ("conv_weight_grad_square_", square, "dilation"),
]


@pytest.mark.parametrize(
    ("op", "call", "name"), CALLS, ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.parametrize("value", [-(2**63), -1, *LARGE, 2**63, 2**70])
@pytest.mark.parametrize("axes", [1, 3])
@on_cpu_and_meta
def test_numbers_beyond_all_volumes(
    op: str, call: Callable[..., Tensor], name: str, value: int, axes: int, place: str
) -> None:
    """A stride that is larger than what is left of the volume is one step; anything else is refused."""
    with torch.device(place):
        if name == "stride" and value == 2**31 - 1 and op == "small_conv3d":
            far, near = call(stride=on_axes(value, axes, 4)), call(stride=[4, 4, 4])
            assert far.shape == near.shape
            assert place == "meta" or torch.equal(far, near)
            return
        with pytest.raises((RuntimeError, InputError), match=rf"^({op}: )?{name}\b|^{op}: (input|grad) "):
            call(**{name: on_axes(value, axes, 0 if name == "padding" else 1)})


def test_spoilt_calls_on_meta_end_as_on_the_cpu() -> None:
    for seed in range(1000):
        check_on_meta(*spoilt_call(random.Random(seed)))


@pytest.mark.parametrize("power", range(20, 31))
@on_cpu_and_meta
def test_paddings_whose_product_is_beyond_all_volumes(power: int, place: str) -> None:
    for op, call in (
        ("small_conv3d", small),
        ("winograd_conv3d", winograd),
        ("conv_weight_grad_square_", square),
        ("conv3d_weight_gradient", weight_gradient),
    ):
        refused = pytest.raises(RuntimeError, match=rf"^{op}: input with its padding must hold at most")
        with torch.device(place), refused:
            call(padding=[2**power] * 3)


def test_a_long_axis_of_padding_is_served() -> None:
    input, weight, length = torch.ones(1, 1, 1, 1, 1), torch.full((1, 1, 1, 1, 1), 3.0), 2**18
    result = layer_ops.small_conv3d(input, weight, stride=ONES, padding=(0, 0, length), dilation=ONES)
    assert result.nonzero().tolist() == [[0, 0, 0, 0, length]]
    strided = layer_ops.small_conv3d(
        input, weight, stride=(1, 1, length), padding=(0, 0, length), dilation=ONES
    )
    assert strided.flatten().tolist() == [0.0, 3.0, 0.0]
    acc = torch.zeros(1, 1, 1, 1, 1)
    ops.conv_weight_grad_square_(
        acc,
        torch.full((1, 1, 1, 1, 3), 2.0),
        input,
        stride=(1, 1, length),
        padding=(0, 0, length),
        dilation=ONES,
    )
    assert acc.item() == 4.0


@pytest.mark.parametrize("groups", [0, -1, 2, 2**31, 2**62, -(2**63)])
@on_cpu_and_meta
def test_groups_that_do_not_divide(groups: int, place: str) -> None:
    with (
        torch.device(place),
        pytest.raises(RuntimeError, match="conv_weight_grad_square_: groups must divide"),
    ):
        square(groups=groups)
    with torch.device(place), pytest.raises(RuntimeError, match="conv3d_weight_gradient: groups must divide"):
        weight_gradient(groups=groups)


def test_groups_of_no_channels() -> None:
    acc, geometry = torch.zeros(0, 2, 1, 1, 1), {"stride": ONES, "padding": NONE, "dilation": ONES}
    with pytest.raises(RuntimeError, match="conv_weight_grad_square_: "):
        ops.conv_weight_grad_square_(
            acc, torch.ones(1, 0, 1, 1, 1), torch.ones(1, 4, 1, 1, 1), groups=2**62, **geometry
        )


@pytest.mark.parametrize("size", [-(2**63), -1, 0, *LARGE])
@pytest.mark.parametrize("axes", [1, 3])
@on_cpu_and_meta
def test_sizes_that_no_strided_convolution_has(size: int, axes: int, place: str) -> None:
    refused = pytest.raises(RuntimeError, match=r"^strided_conv3d_input_gradient: (size|grad) must")
    with torch.device(place), refused:
        layer_ops.strided_conv3d_input_gradient(
            torch.ones(1, 2, 2, 2, 2), torch.ones(2, 3, 3, 3, 3), on_axes(size, axes, 4)
        )


HUGE = 2**62
EMPTY_BUT_HUGE: list[Callable[[], object]] = [
    lambda: upsampled_ops.upsample_nearest3d(torch.empty(0, 1, HUGE, 1, 1)),
    lambda: upsampled_ops.neighbour_sums3d(torch.empty(0, 1, 1, 1, HUGE)),
    lambda: layer_ops.conv3d_weight_gradient(
        torch.ones(0, 1, 1, 1, 1),
        torch.empty(0, 1, 1, 1, HUGE),
        ONES,
        stride=ONES,
        padding=NONE,
        dilation=ONES,
    ),
    lambda: upsampled_ops.upsampled_conv3d(torch.empty(0, 1, 1, 1, HUGE), torch.ones(1, 1, 3, 3, 3)),
    lambda: layer_ops.winograd_conv3d(torch.empty(0, 1, 1, 1, HUGE), torch.ones(1, 1, 3, 3, 3), padding=ONES),
    lambda: layer_ops.small_conv3d(
        torch.ones(1, 1, 1, 1, 1),
        torch.empty(0, 1, 1, 1, HUGE),
        stride=ONES,
        padding=NONE,
        dilation=(1, 1, 4),
    ),
    lambda: ops.conv_weight_grad_square_(
        torch.empty(0, 1, 1, 1, HUGE),
        torch.empty(1, 0, 1, 1, 1),
        torch.ones(1, 1, 1, 1, 1),
        stride=ONES,
        padding=NONE,
        dilation=(1, 1, 4),
    ),
]


@pytest.mark.parametrize("call", EMPTY_BUT_HUGE)
@on_cpu_and_meta
def test_empty_tensors_of_huge_sizes_are_refused(call: Callable[[], object], place: str) -> None:
    with torch.device(place), pytest.raises(RuntimeError, match=r"^\w+: \w+ must have sizes < 2\^31"):
        call()


@pytest.mark.parametrize("bias", [None, torch.tensor([1.0, -2.0, 3.0])], ids=["no bias", "bias"])
@pytest.mark.parametrize("mirrored", [False, True])
def test_convolutions_of_no_channels_give_the_bias(bias: Tensor | None, mirrored: bool) -> None:
    def weight(outputs: int, *taps: int) -> Tensor:
        return torch.empty((0, outputs, *taps) if mirrored else (outputs, 0, *taps))

    input = torch.empty(2, 0, 4, 4, 5)
    expected = torch.zeros(3) if bias is None else bias
    results = [
        layer_ops.winograd_conv3d(input, weight(3, 3, 3, 3), bias, padding=ONES, mirrored=mirrored),
        layer_ops.small_conv3d(
            input, weight(3, 2, 2, 2), bias, stride=ONES, padding=NONE, dilation=ONES, mirrored=mirrored
        ),
        upsampled_ops.upsampled_conv3d(input, torch.empty(3, 0, 3, 3, 3), bias),
    ]
    for result in results:
        assert torch.equal(result, expected.view(1, 3, 1, 1, 1).expand_as(result))
    gradient = layer_ops.strided_conv3d_input_gradient(torch.empty(2, 0, 2, 2, 2), weight_of(0, 3), [4, 4, 3])
    assert gradient.shape == (2, 3, 4, 4, 3)
    assert not gradient.any()
    sums = upsampled_ops.upsampled_conv3d_input_gradient(torch.empty(2, 0, 9, 9, 9), weight_of(0, 3))
    assert sums.shape == (2, 3, 4, 4, 4)
    assert not sums.any()


def weight_of(outputs: int, inputs: int) -> Tensor:
    return torch.empty(outputs, inputs, 3, 3, 3)


@pytest.mark.parametrize(
    "shape", [(0, 2, 4, 4, 4), (2, 0, 4, 4, 4), (2, 2, 0, 4, 4), (2, 2, 4, 4, 0)], ids=str
)
def test_other_operators_of_nothing(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape)
    assert norm_ops.group_norm(x, groups=max(shape[1], 1))[0].shape == shape
    assert norm_ops.batch_norm(x)[0].shape == shape
    planes = shape[0] * shape[1]
    below, for_weight, for_bias, _ = norm_ops.norm_backward(x, x, torch.ones(planes), torch.ones(planes))
    assert below.shape == shape
    assert for_weight.shape == for_bias.shape == shape[:2]
    assert not for_weight.any()
    assert not for_bias.any()
    assert upsampled_ops.upsample_nearest3d(x).numel() == 0
    labels, scores = (
        timm_ext.sample_labels(x, torch.zeros(shape[0], dtype=torch.int64), "bernoulli")
        if shape[1]
        else (x, x)
    )
    assert labels.shape == scores.shape == shape
    acc = [torch.ones(shape)]
    timm_ext.square_accumulate_(acc, [x])
    assert acc[0].shape == shape
    weights = torch.ones(3, shape[1], 3, 3, 3)
    grad = torch.ones(shape[0], 3, *((size + 1) // 2 for size in shape[2:]))
    if min(shape[2:]) > 0:
        ops.conv_weight_grad_square_(weights, grad, x, stride=(2, 2, 2), padding=ONES, dilation=ONES)
        assert bool((weights == 1).all())


SIZES = [[2**61 - 1], [2**62], [2**63 - 1], [2**31, 2**31], [2**40, 2**40], [-1], [0, -1], [4, -(2**63)]]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.uint8], ids=str)
@pytest.mark.parametrize("kept", [False, True], ids=["closed", "open"])
@on_cpu_and_meta
def test_tensors_for_which_there_is_no_memory(
    sizes: list[int], dtype: torch.dtype, kept: bool, place: str
) -> None:
    like = torch.zeros(1, dtype=dtype, device=place)
    if place == "meta" and min(sizes) >= 0 and prod(sizes) * dtype.itemsize < 2**63:
        assert new_tensor(like, sizes).shape == tuple(sizes)  # which nobody need have memory for
        return

    def make() -> None:
        where = rf"sizes must be those of a tensor for which there is memory on {place} \(got"
        with pytest.raises(RuntimeError, match=where):
            new_tensor(like, sizes)

    if kept:
        with kept_memory():
            make()
    else:
        make()


def test_a_copy_that_does_not_fit_says_so() -> None:
    """What PyTorch says about a call of an operator comes through, and not the name of the call."""
    input, acc = torch.ones(1).expand(1, 2**14, 1024, 1024, 2047), torch.zeros(1, 2**14, 1, 1, 1)
    with pytest.raises(RuntimeError, match=r"^timm_ext: an operator must have memory .*allocate") as caught:
        ops.conv_weight_grad_square_(
            acc, torch.ones(1, 1, 1, 1, 1), input, stride=ONES, padding=NONE, dilation=ONES
        )
    assert "API call failed" not in str(caught.value)


def works_in_child() -> bool:
    child = os.fork()
    if child == 0:
        tensor = new_tensor(torch.zeros(1), (1 << 18,))
        os._exit(0 if tensor.numel() == 1 << 18 else 1)
    for _ in range(2000):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_beside_busy_threads_may_take_memory() -> None:
    stop = threading.Event()

    def work() -> None:
        like = torch.zeros(1)
        while not stop.is_set():
            new_tensor(like, (1 << 17,))

    with kept_memory():
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            results = [works_in_child() for _ in range(30)]
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert all(results), f"{results.count(False)} of {len(results)} children hung or failed"
