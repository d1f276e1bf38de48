"""Norms and their backward against float64, their bits, and the messages."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from timm_ext.ops import reference
from timm_ext.ops.norm import batch_norm, group_norm, norm_backward

EPSILON = 1e-5


def instance_norm(
    input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, epsilon: float = EPSILON
) -> tuple[Tensor, Tensor, Tensor]:
    """A group for each channel."""
    return group_norm(input, weight, bias, groups=input.shape[1], epsilon=epsilon)


def instance_norm_backward(*, slope: float = 1.0, **call: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of three gradients, with the slope as a number."""
    return norm_backward(**call, slope=torch.full((1,), slope), epsilon=EPSILON)[:3]


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
        "variance": points.var(2, unbiased=False).float(),
        "weight": torch.randn(sizes[1], generator=generator),
        "bias": torch.randn(sizes[1], generator=generator),
    }


@pytest.mark.parametrize(
    "sizes", [[1, 3, 8, 8, 8], [2, 5, 3, 5, 7], [3, 2, 40000], [1, 1, 1, 2], [2, 3, 4096]]
)
def test_it_normalises(sizes) -> None:
    call = arguments(sizes)
    output, mean, variance = instance_norm(call["input"], call["weight"], call["bias"], epsilon=EPSILON)
    wide = [call[name].double() for name in ("input", "weight", "bias")]
    wanted = functional.instance_norm(wide[0], weight=wide[1], bias=wide[2], eps=EPSILON)
    torch.testing.assert_close(output.double(), wanted, rtol=2e-6, atol=2e-6)
    points = wide[0].flatten(2)
    torch.testing.assert_close(mean.double(), points.mean(2).flatten(), rtol=1e-7, atol=0)
    expected = points.var(2, unbiased=False).flatten()
    torch.testing.assert_close(variance.double(), expected, rtol=1e-6, atol=0)


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
    output, mean, variance = instance_norm(
        torch.full((1, 2, 5000), 0.1), torch.ones(2), torch.tensor([3.0, -1])
    )
    assert torch.equal(output, torch.tensor([3.0, -1]).view(1, 2, 1).expand(1, 2, 5000))
    assert torch.equal(mean, torch.full((2,), 0.1))
    assert bool((variance < 1e-15).all())


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
    rstd = (call["variance"] + EPSILON).rsqrt()
    terms = call["grad"].abs().max(), call["weight"].abs().max() * rstd.max()
    scales = terms[0] * max(terms[1], 1), terms[0], terms[0]
    # The mean is given in float32: where the points lie close together, its rounding is a part of x̂.
    bound += 2.0**-23 * float((call["mean"].abs().flatten() * rstd.flatten()).max())
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


@settings(max_examples=40)
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
        "variance": torch.zeros(sizes[:2]),
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
        ({"mean": torch.zeros(5)}, r"mean must hold a number for each group .*\(got \[5\]\)"),
        ({"variance": torch.zeros(12)[::2]}, r"variance must hold 6 elements, contiguous"),
        ({"mean": None}, r"mean must be given where it is that of groups"),
        ({"slope": torch.zeros(2)}, r"slope must hold 3 elements"),
        ({"over": "all"}, r"over must be groups, batch or nothing \(got all\)"),
        ({"weight": torch.zeros(6)}, r"weight must hold 3 elements"),
        ({"bias": torch.zeros(3, dtype=torch.float16)}, r"bias must be float32 \(got float16\)"),
    ],
)
def test_what_does_not_fit_is_refused(change, message) -> None:
    with pytest.raises(RuntimeError, match="norm_backward: " + message):
        norm_backward(**arguments([2, 3, 4]) | change)


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
    with pytest.raises(RuntimeError, match="group_norm: " + message):
        group_norm(**call, groups=3)


@pytest.mark.parametrize("groups", [0, -1, 2])
def test_groups_have_to_divide_the_channels(groups) -> None:
    expected = rf"groups must divide the channels of input, 3 \(got {groups}\)"
    with pytest.raises(RuntimeError, match="group_norm: " + expected):
        group_norm(torch.zeros(2, 3, 4), groups=groups)


SIZES = [[1, 6, 8, 8, 8], [2, 6, 3, 5, 7], [3, 12, 9000], [2, 42, 5, 4], [5, 6, 1]]
SLOPES = {"none": 0, "one": 1, "each": 2}


def wide_of(call: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if value is None else value.double() for name, value in call.items()}


@pytest.mark.parametrize("sizes", SIZES)
def test_groups_and_batches_are_those_of_pytorch(sizes) -> None:
    call = arguments(sizes)
    x, weight, bias = (call[name] for name in ("input", "weight", "bias"))
    wide = x.double(), weight.double(), bias.double()
    for groups in (1, 2, 3):
        found = group_norm(x, weight, bias, groups=groups)[0]
        if x[0].numel() == groups:
            continue
        wanted = functional.group_norm(wide[0], groups, *wide[1:], EPSILON)
        torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=2e-6)
    found, mean, variance = batch_norm(x, weight, bias)
    wanted = functional.batch_norm(wide[0], None, None, *wide[1:], True, 0.1, EPSILON)
    torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=2e-6)
    points = wide[0].transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.double(), points.mean(1), rtol=2e-7, atol=0)
    torch.testing.assert_close(variance.double(), points.var(1, unbiased=False), rtol=1e-6, atol=0)


@pytest.mark.parametrize("slopes", SLOPES)
@pytest.mark.parametrize("over", ["groups", "batch", "nothing"])
@pytest.mark.parametrize("sizes", SIZES[:4])
def test_the_backward_is_that_of_its_twin(sizes, over, slopes) -> None:
    call = arguments(sizes)
    call["slope"] = [None, torch.tensor([0.3]), torch.linspace(-0.2, 0.9, sizes[1])][SLOPES[slopes]]
    statistics = {
        "groups": lambda: group_norm(call["input"], groups=3)[1:],
        "batch": lambda: batch_norm(call["input"])[1:],
        "nothing": lambda: (torch.linspace(4, 6, sizes[1]), torch.linspace(5, 9, sizes[1])),
    }[over]
    call["mean"], call["variance"] = statistics()
    wanted = slopes != "none"
    found = norm_backward(**call, over=over, slope_wanted=wanted)
    expected = reference.norm_backward(**wide_of(call), over=over, slope_wanted=wanted)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() <= 1e-6 * other.norm()


@pytest.mark.parametrize("over", ["groups", "batch"])
def test_the_twin_is_the_gradient(over) -> None:
    """Of the sum over the examples, by autograd in float64."""
    call = wide_of(arguments([3, 6, 4, 5]))
    slope = torch.linspace(0.1, 0.7, 6).double()
    leaves = [call["input"], call["weight"], call["bias"], slope]
    x, weight, bias, steep = (leaf.requires_grad_() for leaf in leaves)
    if over == "groups":
        normal = functional.group_norm(x, 2, weight, bias, EPSILON)
        statistics = reference.group_norm(x, groups=2)[1:]
    else:
        normal = functional.batch_norm(x, None, None, weight, bias, True, 0.1, EPSILON)
        statistics = reference.batch_norm(x)[1:]
    wanted = torch.autograd.grad(functional.prelu(normal, steep), leaves, call["grad"])
    given = [leaf.detach() for leaf in leaves]
    below, *rows = reference.norm_backward(
        call["grad"], given[0], *[s.detach() for s in statistics], *given[1:], over=over, slope_wanted=True
    )
    for one, other in zip([below, *[row.sum(0) for row in rows]], wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_prelu_alone_is_a_norm_by_constants() -> None:
    call = arguments([3, 6, 4, 5])
    x, slope = (call["input"] - 5).double().requires_grad_(), torch.linspace(0.1, 0.7, 6).double()
    slope.requires_grad_()
    wanted = torch.autograd.grad(functional.prelu(x, slope), (x, slope), call["grad"].double())
    below, _, _, rows = norm_backward(
        call["grad"], call["input"] - 5, slope=slope.detach().float(), over="nothing", slope_wanted=True
    )
    torch.testing.assert_close(below.double(), wanted[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(rows.sum(0).double(), wanted[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [[2, 6, 9, 10, 33], [3, 40, 5, 5, 5], [1, 12, 20000]])
def test_the_bits_of_groups_and_batches_do_not_depend_on_threads(sizes) -> None:
    """Sets of planes go to threads whole where they are many, and plane by plane where they are few."""
    call = arguments(sizes)
    slope, threads, found = torch.linspace(0, 1, sizes[1]), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results = []
            for groups in (1, 2, sizes[1]):
                output = group_norm(call["input"], call["weight"], groups=groups)
                call["mean"], call["variance"] = output[1:]
                results += [*output, *norm_backward(**call, slope=slope, slope_wanted=True)]
            output = batch_norm(call["input"], None, call["bias"])
            call["mean"], call["variance"] = output[1:]
            for over in ("batch", "nothing"):
                results += norm_backward(**call, slope=slope, over=over, slope_wanted=True)
            found.append([*results, *output])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
