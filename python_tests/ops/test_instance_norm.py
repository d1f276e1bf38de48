"""`instance_norm` and its backward against float64, their bits, and the messages."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from timm_ext.ops.norm import instance_norm, instance_norm_backward

EPSILON = 1e-5


def arguments(sizes: list[int]) -> dict[str, Tensor]:
    """What the operator takes for an input of these sizes, drawn at random; the input's mean is not 0."""
    generator = torch.Generator().manual_seed(0)
    grad, input = (torch.randn(sizes, generator=generator) for _ in range(2))
    input = 3 * input + 5
    points = input.flatten(2).double()
    return {
        "grad": grad,
        "input": input,
        "mean": points.mean(2).float(),
        "rstd": (points.var(2, unbiased=False) + EPSILON).rsqrt().float(),
        "weight": torch.randn(sizes[1], generator=generator),
        "bias": torch.randn(sizes[1], generator=generator),
    }


@pytest.mark.parametrize(
    "sizes", [[1, 3, 8, 8, 8], [2, 5, 3, 5, 7], [3, 2, 40000], [1, 1, 1, 2], [2, 3, 4096]]
)
def test_it_normalises(sizes) -> None:
    call = arguments(sizes)
    output, mean, rstd = instance_norm(call["input"], call["weight"], call["bias"], epsilon=EPSILON)
    wide = [call[name].double() for name in ("input", "weight", "bias")]
    wanted = functional.instance_norm(wide[0], weight=wide[1], bias=wide[2], eps=EPSILON)
    torch.testing.assert_close(output.double(), wanted, rtol=2e-6, atol=2e-6)
    points = wide[0].flatten(2)
    torch.testing.assert_close(mean.double(), points.mean(2).flatten(), rtol=1e-7, atol=0)
    expected = (points.var(2, unbiased=False) + EPSILON).rsqrt().flatten()
    torch.testing.assert_close(rstd.double(), expected, rtol=5e-7, atol=0)


def test_a_mean_far_from_zero_costs_no_digits_but_the_inputs_own() -> None:
    """Parts that lie far apart, and far from zero as a whole; the inputs are exact."""
    steps = torch.randint(-(2**10), 2**10, (1, 2, 70_000), generator=torch.Generator().manual_seed(0)).float()
    steps[:, :, 30_000:] += 2**13
    input = steps + 2.0**22
    output = instance_norm(input, epsilon=0.0)[0].double()
    wanted = functional.instance_norm(input.double(), eps=0.0)
    assert (output - wanted).abs().max() < 2e-4  # half a unit of the mean, 0.25, over the deviation, 4000
    apart = output[:, :, 40_000] - output[:, :, 0]
    torch.testing.assert_close(apart, wanted[:, :, 40_000] - wanted[:, :, 0], rtol=1e-6, atol=0)


def test_it_normalises_without_weight_and_bias() -> None:
    input = arguments([2, 3, 4, 5, 6])["input"]
    plain = instance_norm(input, torch.ones(3), torch.zeros(3))
    assert all(torch.equal(a, b) for a, b in zip(instance_norm(input), plain, strict=True))


def test_a_constant_channel_becomes_the_bias() -> None:
    output, mean, rstd = instance_norm(torch.full((1, 2, 5000), 0.1), torch.ones(2), torch.tensor([3.0, -1]))
    assert torch.equal(output, torch.tensor([3.0, -1]).view(1, 2, 1).expand(1, 2, 5000))
    assert torch.equal(mean, torch.full((2,), 0.1))
    torch.testing.assert_close(rstd, torch.full((2,), 1e-5).rsqrt())


def by_autograd(call: dict[str, Tensor], slope: float) -> list[Tensor]:
    """The gradients of one example after the other, in float64."""
    results = []
    for grad, single in zip(call["grad"].double(), call["input"].double(), strict=True):
        x = single[None].requires_grad_()
        weight, bias = (call[name].double().requires_grad_() for name in ("weight", "bias"))
        normal = functional.instance_norm(x, weight=weight, bias=bias, eps=EPSILON)
        output = functional.leaky_relu(normal, slope)
        results.append(torch.autograd.grad(output, (x, weight, bias), grad[None]))
    below, for_weight, for_bias = zip(*results, strict=True)
    return [torch.cat(below), torch.stack(for_weight), torch.stack(for_bias)]


def assert_near(call: dict[str, Tensor], slope: float, bound: float) -> None:
    """Within a share of the largest terms: of few points, their sum may be nothing but rounding."""
    terms = call["grad"].abs().max(), call["weight"].abs().max() * call["rstd"].max()
    scales = terms[0] * max(terms[1], 1), terms[0], terms[0]
    # The mean is given in float32: where the points lie close together, its rounding is a part of x̂.
    bound += 2.0**-23 * float((call["mean"].abs().flatten() * call["rstd"].flatten()).max())
    for result, wanted, scale in zip(
        instance_norm_backward(**call, slope=slope), by_autograd(call, slope), scales, strict=True
    ):
        assert result.dtype == torch.float32
        assert result.shape == wanted.shape
        assert (result - wanted).abs().max() <= bound * max(wanted.abs().max(), scale)


@pytest.mark.parametrize("slope", [1.0, 0.3, 0.01, 0.0])
@pytest.mark.parametrize("sizes", [[1, 3, 8, 8, 8], [2, 5, 3, 5, 7], [3, 2, 40000], [1, 1, 1, 2]])
def test_it_is_the_gradient(sizes, slope) -> None:
    assert_near(arguments(sizes), slope, 2e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(2, 300))
@example(3, 4, 2)  # two points of a channel 0.06 apart
def test_any_size(batch, channels, points) -> None:
    assert_near(arguments([batch, channels, points]), 0.1, 2e-6)


def test_a_gradient_that_repeats_one_number() -> None:
    """As a sum gives it."""
    call = arguments([2, 3, 4, 5, 6])
    expected = instance_norm_backward(**call | {"grad": torch.full((2, 3, 4, 5, 6), 0.7)}, slope=0.2)
    result = instance_norm_backward(**call | {"grad": torch.tensor(0.7).expand(2, 3, 4, 5, 6)}, slope=0.2)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_without_weight_and_bias() -> None:
    call = arguments([2, 3, 4, 5, 6])
    plain = call | {"weight": torch.ones(3), "bias": torch.zeros(3)}
    expected = instance_norm_backward(**plain, slope=0.2)
    result = instance_norm_backward(**call | {"weight": None, "bias": None}, slope=0.2)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_nan_stays_in_its_channel() -> None:
    call = arguments([2, 3, 4, 5, 6])
    clean = instance_norm_backward(**call, slope=0.2)
    output = instance_norm(call["input"].index_fill(0, torch.tensor([1]), float("nan")))[0]
    assert torch.equal(output[0], instance_norm(call["input"])[0][0])
    assert output[1].isnan().all()
    call["grad"][1, 2, 0, 0, 0] = float("nan")
    result = instance_norm_backward(**call, slope=0.2)
    assert all(part[1, 2].isnan().all() for part in result)
    for part, whole in zip(result, clean, strict=True):
        assert torch.equal(part[0], whole[0])
        assert torch.equal(part[1, :2], whole[1, :2])


def test_the_bits_do_not_depend_on_threads_or_strides() -> None:
    call = arguments([2, 6, 9, 10, 33])
    expected = instance_norm_backward(**call, slope=0.2)
    normalised = instance_norm(call["input"], call["weight"])
    both = "grad", "input"
    strided = call | {name: call[name].to(memory_format=torch.channels_last_3d) for name in both}
    wider = call | {name: torch.cat([call[name]] * 3, 1)[:, 6:12] for name in both}
    spaced = call | {name: call[name].repeat_interleave(2, 4)[..., ::2] for name in both}
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for same in (call, strided, wider, spaced):
                result = instance_norm_backward(**same, slope=0.2)
                assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
                output = instance_norm(same["input"], same["weight"])
                assert all(torch.equal(a, b) for a, b in zip(output, normalised, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("sizes", [[0, 3, 4, 5], [2, 3, 0, 5]])
def test_an_empty_input_has_empty_results(sizes) -> None:
    call = {
        "grad": torch.zeros(sizes),
        "input": torch.zeros(sizes),
        "mean": torch.zeros(sizes[:2]),
        "rstd": torch.zeros(sizes[:2]),
    }
    assert [list(part.shape) for part in instance_norm(call["input"])] == [
        sizes,
        *[[sizes[0] * sizes[1]]] * 2,
    ]
    below, for_weight, for_bias = instance_norm_backward(**call)
    assert list(below.shape) == sizes
    assert list(for_weight.shape) == list(for_bias.shape) == sizes[:2]
    assert not for_bias.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(2, 3, 4).double()}, r"input must be float32 \(got float64\)"),
        ({"input": torch.zeros(2, 3)}, r"input must be \[B, C, ...\] \(got \[2, 3\]\)"),
        ({"grad": torch.zeros(2, 3, 4).double()}, r"grad must be float32 \(got float64\)"),
        (
            {"grad": torch.zeros(2, 3, 5)},
            r"grad must have the shape of input, \[2, 3, 4\] \(got \[2, 3, 5\]",
        ),
        ({"mean": torch.zeros(5)}, r"mean must hold 6 elements, contiguous, .*\(got \[5\]\)"),
        ({"rstd": torch.zeros(12)[::2]}, r"rstd must hold 6 elements, contiguous"),
        ({"weight": torch.zeros(6)}, r"weight must hold 3 elements"),
        ({"bias": torch.zeros(3, dtype=torch.float16)}, r"bias must be float32 \(got float16\)"),
    ],
)
def test_what_does_not_fit_is_refused(change, message) -> None:
    with pytest.raises(RuntimeError, match="instance_norm_backward: " + message):
        instance_norm_backward(**arguments([2, 3, 4]) | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(2, 3, 4).double()}, r"input must be float32 \(got float64\)"),
        ({"input": torch.zeros(2, 3)}, r"input must be \[B, C, ...\] \(got \[2, 3\]\)"),
        ({"weight": torch.zeros(6)}, r"weight must hold 3 elements"),
        ({"bias": torch.zeros(3, dtype=torch.float16)}, r"bias must be float32 \(got float16\)"),
    ],
)
def test_what_cannot_be_normalised_is_refused(change, message) -> None:
    call = {"input": torch.zeros(2, 3, 4), "weight": torch.ones(3), "bias": torch.ones(3)} | change
    with pytest.raises(RuntimeError, match="instance_norm: " + message):
        instance_norm(**call)
