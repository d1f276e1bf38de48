"""Depthwise convolutions and their gradients against float64, their bits, and the messages."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import timm_ext
from timm_ext.ops import reference
from timm_ext.ops.conv3d import conv3d_weight_gradient
from timm_ext.ops.depthwise_conv3d import depthwise_conv3d, depthwise_conv_transpose3d

ERROR = 5e-6  # of the norm of a result


class Case:
    """Input, weight, bias and gradient of the output of a depthwise convolution, normal."""

    def __init__(self, batch: int, channels: int, sizes, kernel, stride, padding, dilation):
        generator = torch.Generator().manual_seed(0)
        self.around = {"stride": list(stride), "padding": list(padding), "dilation": list(dilation)}
        self.kernel, self.sizes = list(kernel), list(sizes)
        self.input = torch.randn(batch, channels, *sizes, generator=generator)
        self.weight = torch.randn(channels, 1, *kernel, generator=generator)
        self.bias = torch.randn(channels, generator=generator)
        shape = reference.depthwise_conv3d(self.input, self.weight, **self.around).shape
        self.grad = torch.randn(shape, generator=generator)

    def results(self) -> dict[str, Tensor]:
        """Of the operators."""
        groups, squares = self.input.shape[1], torch.full_like(self.weight, 0.5)
        timm_ext.conv_weight_grad_square_(
            squares, self.grad, self.input, **self.around, groups=groups, scale=0.25
        )
        return {
            "output": depthwise_conv3d(self.input, self.weight, self.bias, **self.around),
            "bare": depthwise_conv3d(self.input, self.weight, **self.around),
            "input": depthwise_conv_transpose3d(self.grad, self.weight, **self.around, size=self.sizes),
            "transposed": depthwise_conv_transpose3d(
                self.grad, self.weight, self.bias, **self.around, size=self.sizes
            ),
            "weight": conv3d_weight_gradient(
                self.grad, self.input, self.kernel, **self.around, groups=groups
            ),
            "squares": squares,
        }

    def expected(self) -> dict[str, Tensor]:
        """The same by autograd in float64."""
        groups, shift = self.input.shape[1], self.bias.double().view(-1, 1, 1, 1)
        squares, examples = torch.full_like(self.weight, 0.5, dtype=torch.float64), []
        for x, g in zip(self.input.double().split(1), self.grad.double().split(1), strict=True):
            leaves = [x.requires_grad_(), self.weight.double().requires_grad_()]
            output = torch.conv3d(*leaves, None, *self.around.values(), groups)
            examples.append((output.detach(), *torch.autograd.grad(output, leaves, g)))
            squares += 0.25 * examples[-1][2].square()
        outputs, inputs, weights = zip(*examples, strict=True)
        output, below = torch.cat(outputs), torch.cat(inputs)
        found = {"output": output + shift, "bare": output, "input": below, "transposed": below + shift}
        return found | {"weight": sum(weights), "squares": squares}


def assert_exact(case: Case) -> None:
    found = case.results()
    for name, expected in case.expected().items():
        assert found[name].shape == expected.shape, name
        assert (found[name] - expected).norm() <= ERROR * expected.norm(), name


ONES, NONE = (1, 1, 1), (0, 0, 0)
CASES = {
    "kernels of 7": (2, 3, (9, 20, 35), (7, 7, 7), ONES, (3, 3, 3), ONES),
    "kernels of 5, stride 2": (2, 3, (10, 11, 40), (5, 5, 5), (2, 2, 2), (2, 2, 2), ONES),
    "kernels of 3, stride 2, odd": (1, 4, (7, 9, 33), (3, 3, 3), (2, 2, 2), ONES, ONES),
    "more than one chunk": (2, 2, (40, 40, 60), (3, 3, 3), ONES, ONES, ONES),
    "a long column": (1, 2, (5, 30, 17), (2, 16, 3), ONES, (0, 9, 1), ONES),
    "dilation and stride that share no factor": (
        2,
        2,
        (9, 12, 40),
        (3, 4, 5),
        (2, 2, 3),
        (1, 2, 4),
        (3, 3, 2),
    ),
    "a stride beyond the kernel": (2, 2, (9, 9, 40), (2, 1, 3), (4, 3, 5), (0, 1, 2), ONES),
    "a stride beyond the volume": (1, 2, (3, 2, 5), (2, 2, 2), (9, 9, 9), ONES, ONES),
    "padding alone": (1, 2, (1, 1, 1), (3, 3, 3), ONES, (4, 4, 4), ONES),
    "an image": (2, 3, (1, 33, 47), (1, 7, 7), ONES, (0, 3, 3), ONES),
    "a row of points": (2, 3, (1, 1, 100), (1, 1, 9), (1, 1, 2), (0, 0, 4), ONES),
}


@pytest.mark.parametrize("name", CASES)
def test_they_are_those_of_float64(name: str) -> None:
    assert_exact(Case(*CASES[name]))


@settings(max_examples=40)
@given(st.data())
def test_any_geometry(data: st.DataObject) -> None:
    def three(least: int, most: int) -> list[int]:
        return [data.draw(st.integers(least, most)) for _ in range(3)]

    kernel, stride, padding, dilation = three(1, 8), three(1, 3), three(0, 4), three(1, 3)
    room = zip(kernel, padding, dilation, three(0, 12), strict=True)
    sizes = [max(1, gap * (size - 1) + 1 - 2 * pad) + more for size, pad, gap, more in room]
    assert_exact(Case(data.draw(st.integers(1, 3)), 2, sizes, kernel, stride, padding, dilation))


@pytest.mark.parametrize("name", ["kernels of 7", "kernels of 5, stride 2", "more than one chunk"])
def test_the_bits_do_not_depend_on_threads_strides_or_neighbours(name: str) -> None:
    case = Case(*CASES[name])
    expected = case.results()
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 4, 5):
            torch.set_num_threads(count)
            assert all(torch.equal(value, expected[key]) for key, value in case.results().items())
    finally:
        torch.set_num_threads(threads)
    alone = depthwise_conv3d(case.input[:1, 1:2], case.weight[1:2], case.bias[1:2], **case.around)
    assert torch.equal(alone, expected["output"][:1, 1:2])
    case.input, case.weight, case.grad = (
        x.to(memory_format=torch.channels_last_3d) for x in (case.input, case.weight, case.grad)
    )
    assert all(torch.equal(value, expected[key]) for key, value in case.results().items())


def test_what_is_not_finite_stays_near() -> None:
    case = Case(1, 2, (8, 9, 20), (3, 3, 3), ONES, ONES, ONES)
    clean = case.results()["bare"]
    case.input[0, 0, 4, 4, 8] = float("nan")
    found = case.results()["bare"]
    near = torch.zeros(8, 9, 20, dtype=torch.bool)
    near[3:6, 3:6, 7:10] = True
    assert torch.equal(found[0, 0].isnan(), near)
    assert torch.equal(found[0, 0, ~near], clean[0, 0, ~near])
    assert torch.equal(found[0, 1], clean[0, 1])


@pytest.mark.parametrize(("batch", "channels"), [(0, 3), (2, 0)])
def test_nothing_gives_nothing(batch: int, channels: int) -> None:
    input, weight = torch.empty(batch, channels, 4, 5, 6), torch.ones(channels, 1, 3, 3, 3)
    around = {"stride": [2] * 3, "padding": [1] * 3, "dilation": [1] * 3}
    assert depthwise_conv3d(input, weight, **around).shape == (batch, channels, 2, 3, 3)
    assert depthwise_conv_transpose3d(input, weight, **around, size=[7, 9, 12]).shape == (
        batch,
        channels,
        7,
        9,
        12,
    )


GEOMETRY = {"stride": [1] * 3, "padding": [0] * 3, "dilation": [1] * 3}
REFUSED = [
    ({"input": torch.zeros(1, 2, 4, 4, 4).double()}, r"input must be float32 \(got float64\)"),
    ({"input": torch.zeros(2, 4, 4, 4)}, r"input must have 5 axes \(got \[2, 4, 4, 4\]\)"),
    ({"weight": torch.zeros(3, 1, 2, 2, 2)}, r"weight must be \[2, 1, \.\.\.\] for input .*got \[3, 1, 2,"),
    ({"weight": torch.zeros(2, 2, 2, 2, 2)}, r"weight must be \[2, 1, \.\.\.\]"),
    ({"weight": torch.zeros(2, 1, 2, 0, 2)}, r"weight must be \[2, 1, \.\.\.\]"),
    ({"bias": torch.zeros(3)}, r"bias must be \[2\], contiguous \(got \[3\]\)"),
    ({"bias": torch.zeros(4)[::2]}, r"bias must be \[2\], contiguous"),
    ({"stride": [1, 1]}, r"stride must hold 3 numbers >= 1 \(got \[1, 1\]\)"),
    ({"stride": [1, 0, 1]}, r"stride must hold 3 numbers >= 1"),
    ({"padding": [1, -1, 1]}, r"padding must hold 3 numbers >= 0"),
    ({"dilation": [1, 2**31, 1]}, r"dilation must hold numbers < 2\^31"),
    ({"padding": [2**20] * 3}, r"(input|size) with its padding must hold at most|input must have the sizes"),
]


def placed(value: object, device: str) -> object:
    """A tensor on another device with the same strides; anything else as it is."""
    if not isinstance(value, Tensor) or device == "cpu":
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_does_not_fit_is_refused(change, message: str, transposed: bool, device: str) -> None:
    call = {"input": torch.zeros(1, 2, 4, 4, 4), "weight": torch.zeros(2, 1, 2, 2, 2), "bias": None}
    call = {name: placed(value, device) for name, value in (call | GEOMETRY | change).items()}
    function, size = depthwise_conv3d, {}
    if transposed:
        function, size = depthwise_conv_transpose3d, {"size": [5] * 3}
    with pytest.raises(RuntimeError, match=f"^{function.__name__}: {message}"):
        function(**call, **size)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": [5, 5]}, r"size must hold 3 numbers >= 1 \(got \[5, 5\]\)"),
        ({"size": [5, 0, 5]}, r"size must hold 3 numbers >= 1"),
        (
            {"size": [5, 1, 5]},
            r"size with its padding must be at least as large as the kernel \(got \[5, 1, 5\]",
        ),
        (
            {"size": [5, 6, 5]},
            r"input must have the sizes that a convolution makes of size, \[4, 5, 4\] \(got ",
        ),
        (
            {"size": [2] * 3, "stride": [2**30] * 3, "input": torch.zeros(1, 2, 1, 1, 1)},
            None,
        ),
        (
            {"size": [2000] * 3, "stride": [5000] * 3, "input": torch.zeros(1, 2, 1, 1, 1)},
            r"(stride must make at most 65536 phases of size|input with its padding must hold)",
        ),
        (
            {"size": [500] * 3, "stride": [5000] * 3, "input": torch.zeros(1, 2, 1, 1, 1)},
            r"stride must make at most 65536 phases of size \(got stride \[5000, 5000, 5000\] and size",
        ),
    ],
)
def test_sizes_of_transposed_ones(change, message: str | None, device: str) -> None:
    call = {"input": torch.zeros(1, 2, 4, 4, 4), "weight": torch.ones(2, 1, 2, 2, 2), "size": [5] * 3}
    call = {name: placed(value, device) for name, value in (call | GEOMETRY | change).items()}
    if message is None:
        assert depthwise_conv_transpose3d(**call).shape == (1, 2, *change["size"])
        return
    with pytest.raises(RuntimeError, match=f"^depthwise_conv_transpose3d: {message}"):
        depthwise_conv_transpose3d(**call)


def test_phases_beyond_the_memory_are_refused() -> None:
    input, weight = (
        torch.zeros(1, 2, 600, 600, 600, device="meta"),
        torch.zeros(2, 1, 600, 600, 600, device="meta"),
    )
    with pytest.raises(RuntimeError, match=r"a channel's phases must hold at most 268435456 elements"):
        depthwise_conv3d(input, weight, stride=[600] * 3, padding=[0] * 3, dilation=[1] * 3)
