"""The merge against its definition in float64, in values, gradients and contracts."""

import pytest
import torch
from merge_samples import (
    BACKWARD_BOUND,
    FORWARD_BOUND,
    SAMPLES,
    Inputs,
    Sample,
    extreme_inputs,
    make_inputs,
    shares,
)
from torch import Tensor

import timm_ext
from timm_ext.ops import reference

all_samples = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    """Hold |actual - expected| <= bound everywhere; a failure shows the worst entries."""
    actual, expected = actual.detach().cpu().double(), expected.detach()
    bound = torch.as_tensor(bound, dtype=torch.float64).expand(expected.shape)
    excess = (actual - expected).abs() - bound
    if not bool((excess <= 0).all()):  # NaN fails, too
        worst = excess.nan_to_num(nan=torch.inf).flatten().topk(min(5, excess.numel())).indices
        rows = [
            f"{int(i)}: {actual.flatten()[i]} for {expected.flatten()[i]}, bound {bound.flatten()[i]}"
            for i in worst
        ]
        pytest.fail("\n".join(["beyond the bound:", *rows]))


def forward_bound(inputs: Inputs) -> Tensor:
    magnitude = (shares(inputs) * inputs.double().theta.abs()).sum(0)
    smallest = 2.0**-25 if inputs.theta.dtype == torch.float16 else 1e-37  # half a denormal step
    return FORWARD_BOUND[inputs.theta.dtype] * magnitude + smallest


@all_samples
def test_value_is_that_of_the_reference(sample: Sample, device: torch.device) -> None:
    inputs = make_inputs(sample, device)
    arguments, options = inputs.arguments()
    merged = timm_ext.fused_merge(*arguments, **options)
    assert merged.dtype == sample.dtype
    assert merged.shape == (sample.elements,)
    arguments, options = inputs.double().arguments()
    assert_within(merged, reference.fused_merge(*arguments, **options), forward_bound(inputs))


@all_samples
def test_gradients_are_those_of_the_reference(sample: Sample, device: torch.device) -> None:
    inputs = make_inputs(sample, device)
    wide = inputs.double()
    gradient = torch.randn(sample.elements).to(sample.dtype)
    got = gradients(timm_ext.fused_merge, inputs, gradient.to(device))
    expected = gradients(reference.fused_merge, wide, gradient.double())
    tolerance = BACKWARD_BOUND[sample.dtype]
    for actual, wanted in zip(got, expected, strict=True):
        scale = wanted.abs().amax() if wanted.numel() else 0.0
        assert_within(actual, wanted, tolerance * scale)


def gradients(merge: object, inputs: Inputs, gradient: Tensor) -> tuple[Tensor, ...]:
    leaves = inputs.require_grad()
    arguments, options = inputs.arguments()
    merged = merge(*arguments, **options)  # type: ignore[operator]
    return torch.autograd.grad(merged, leaves, gradient)


def test_two_models_by_hand(device: torch.device) -> None:
    theta = torch.tensor([[1.0, 2.0], [5.0, -2.0]], device=device)
    fisher = torch.tensor([[3.0, 1.0], [1.0, 0.0]], device=device)
    logits = torch.zeros(1, 2, device=device, requires_grad=True)
    merged = timm_ext.fused_merge(theta, fisher, logits, torch.tensor([0, 2], device=device))
    assert merged.tolist() == [2.0, 2.0]  # (3·1 + 1·5) / 4, and the only model with a weight
    merged.sum().backward()
    # d log σ(δ)/dδ = 1/2 at 0; c_0 = 3/4 (1 - 2), c_1 = 1/4 (5 - 2)
    assert logits.grad.tolist() == [[-0.375, 0.375]]


@pytest.mark.parametrize("models", [2, 3, 5])
def test_extreme_fishers_keep_full_precision(models: int) -> None:
    inputs = extreme_inputs(models, 200_000)
    arguments, _ = inputs.arguments()
    merged = timm_ext.fused_merge(*arguments)
    wide_arguments, _ = inputs.double().arguments()
    assert_within(merged, reference.fused_merge(*wide_arguments), forward_bound(inputs))
    assert bool((merged >= inputs.theta.amin(0)).all())
    assert bool((merged <= inputs.theta.amax(0)).all())


@pytest.mark.parametrize("models", [2, 3, 5])
def test_extreme_fishers_keep_the_gradient_precise(models: int) -> None:
    inputs = extreme_inputs(models, 200_000)
    gradient = torch.randn(200_000)
    arguments, _ = inputs.arguments()
    logits = inputs.logits.requires_grad_()
    merged = timm_ext.fused_merge(arguments[0], arguments[1], logits, arguments[3])
    (got,) = torch.autograd.grad(merged, logits, gradient)
    wide = inputs.double()
    merged = reference.fused_merge(wide.theta, wide.fisher, wide.logits.requires_grad_(), wide.offsets)
    (expected,) = torch.autograd.grad(merged, wide.logits, gradient.double())
    offset = wide.theta - merged.detach()
    terms = (gradient.double() * shares(inputs) * offset).abs().view(models, -1, 10_000).sum(2).T
    assert_within(
        got, expected, BACKWARD_BOUND[torch.float32] * terms * torch.sigmoid(-wide.logits.detach()) + 1e-30
    )
    assert float((got - expected).norm() / expected.norm()) <= BACKWARD_BOUND[torch.float32]


def test_models_that_agree_merge_exactly_with_zero_gradient(device: torch.device) -> None:
    inputs = make_inputs(Sample("", models=5, lengths=(100, 900)), device)
    inputs.theta = torch.randn(1000, device=device).expand(5, 1000).clone()
    inputs.require_grad()
    arguments, _ = inputs.arguments()
    merged = timm_ext.fused_merge(*arguments)
    assert torch.equal(merged, inputs.theta[0])
    merged.backward(torch.randn(1000, device=device))
    assert not inputs.logits.grad.any()
    assert not inputs.fisher.grad.any()


def test_where_every_fisher_is_zero_the_ratios_weigh(device: torch.device) -> None:
    theta = torch.tensor([[1.0], [5.0]], device=device)
    ratio = torch.tensor([[0.75, 0.25]], device=device, requires_grad=True)
    offsets = torch.tensor([0, 1], device=device)
    fisher = torch.zeros(2, 1, device=device, requires_grad=True)
    merged = timm_ext.fused_merge(theta, fisher, ratio, offsets, mixing="ratios")
    assert merged.item() == pytest.approx(2.0, rel=1e-6)
    merged.sum().backward()
    # d/da (a + 5 b) / (a + b) at a = 3/4, b = 1/4
    torch.testing.assert_close(ratio.grad.cpu(), torch.tensor([[-1.0, 3.0]]))
    assert not fisher.grad.any()


def test_a_ratio_of_zero_leaves_the_model_out_whatever_its_fisher(device: torch.device) -> None:
    theta = torch.tensor([[1.0], [2.0], [4.0]], device=device)
    fisher = torch.tensor([[1e38], [3e-41], [1e-41]], device=device)
    ratio = torch.tensor([[0.0, 1.0, 1.0]], device=device)
    merged = timm_ext.fused_merge(theta, fisher, ratio, torch.tensor([0, 1], device=device), mixing="ratios")
    assert merged.item() == pytest.approx(2.5, rel=1e-4)  # denormals carry few digits themselves


@pytest.mark.parametrize(
    ("mixing", "row"),
    [("sigmoid", [0.0, float("nan")]), ("ratios", [0.0, 0.0]), ("ratios", [1.0, -1.0])],
)
def test_rows_without_meaning_give_nan_in_their_segment_only(
    mixing: str, row: list[float], device: torch.device
) -> None:
    logits = torch.tensor([row, [1.0, 1.0]], device=device)
    theta = torch.ones(2, 4, device=device)
    merged = timm_ext.fused_merge(theta, None, logits, torch.tensor([0, 2, 4], device=device), mixing=mixing)
    assert bool(merged[:2].isnan().all())
    assert merged[2:].tolist() == [1.0, 1.0]


def test_nan_in_theta_stays_where_it_is(device: torch.device) -> None:
    theta = torch.ones(3, 40, device=device)
    theta[1, 7] = torch.nan
    merged = timm_ext.fused_merge(
        theta, None, torch.zeros(1, 3, device=device), torch.tensor([0, 40], device=device)
    )
    assert merged.isnan().nonzero().flatten().tolist() == [7]


def test_one_model_passes_the_gradient_to_itself_alone(device: torch.device) -> None:
    inputs = make_inputs(Sample("", models=1, lengths=(3, 700, 40)), device)
    inputs.fisher[:, ::2] = 0
    inputs.require_grad()
    arguments, _ = inputs.arguments()
    merged = timm_ext.fused_merge(*arguments)
    gradient = torch.randn(743, device=device)
    merged.backward(gradient)
    torch.testing.assert_close(inputs.theta.grad[0], gradient, rtol=2.0**-22, atol=0)  # times F · (1 / F)
    assert not inputs.fisher.grad.any()
    assert not inputs.logits.grad.any()


def test_no_elements_and_no_segments(device: torch.device) -> None:
    inputs = make_inputs(Sample("", lengths=()), device)
    leaves = inputs.require_grad()
    arguments, _ = inputs.arguments()
    merged = timm_ext.fused_merge(*arguments)
    assert merged.shape == (0,)
    merged.sum().backward()
    assert [leaf.grad.shape for leaf in leaves] == [(2, 0), (2, 0), (0, 2)]
    out = torch.empty(0, device=device)
    with torch.no_grad():
        assert timm_ext.fused_merge(*arguments, out=out) is out


@pytest.mark.parametrize("kind", ["expanded", "strided"])
def test_gradients_with_any_stride(kind: str, device: torch.device) -> None:
    inputs = make_inputs(SAMPLES[0], device)
    elements = SAMPLES[0].elements
    gradient = (
        torch.tensor(0.7, device=device).expand(elements)
        if kind == "expanded"
        else torch.randn(elements, 2, device=device)[:, 1]
    )
    got = gradients(timm_ext.fused_merge, inputs, gradient)
    expected = gradients(timm_ext.fused_merge, inputs, gradient.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_out_is_filled_and_returned(device: torch.device) -> None:
    inputs = make_inputs(SAMPLES[2], device)
    arguments, options = inputs.arguments()
    out = torch.empty(SAMPLES[2].elements, device=device)
    version = out._version
    assert timm_ext.fused_merge(*arguments, **options, out=out) is out
    assert torch.equal(out, timm_ext.fused_merge(*arguments, **options))
    assert out._version > version  # autograd notices when a saved tensor was overwritten


def test_inference_mode(device: torch.device) -> None:
    inputs = make_inputs(SAMPLES[0], device)
    arguments, options = inputs.arguments()
    with torch.inference_mode():
        out = torch.empty(SAMPLES[0].elements, device=device)
        assert torch.equal(
            timm_ext.fused_merge(*arguments, **options, out=out), timm_ext.fused_merge(*arguments, **options)
        )
        acc = [torch.zeros(3, device=device)]
        timm_ext.square_accumulate_(acc, [torch.ones(3, device=device)])
        assert acc[0].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("mixing", ["sigmoid", "softmax", "ratios"])
def test_gradcheck(mixing: str, device: torch.device) -> None:
    sample = Sample("", models=3, lengths=(4, 2, 5), dtype=torch.float64, mixing=mixing, groups=(1, 0, 1))
    inputs = make_inputs(sample, device)
    leaves = inputs.require_grad()

    def merge(theta: Tensor, fisher: Tensor, logits: Tensor) -> Tensor:
        return timm_ext.fused_merge(
            theta, fisher, logits, inputs.offsets, mixing=mixing, groups=inputs.groups
        )

    assert torch.autograd.gradcheck(merge, leaves, eps=1e-6, atol=1e-7, raise_exception=True)


def test_compiles_to_one_graph(device: torch.device) -> None:
    inputs = make_inputs(SAMPLES[7], device)
    theta, fisher, logits = inputs.require_grad()

    def loss(theta: Tensor, fisher: Tensor, logits: Tensor) -> Tensor:
        merged = timm_ext.fused_merge(theta, fisher, logits, inputs.offsets, groups=inputs.groups)
        return merged.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = (theta, fisher, logits)
    expected = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.autograd.grad(compiled(*leaves), leaves)
    for actual, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_ratios_are_normalised_as_the_merge_uses_them(device: torch.device) -> None:
    logits = torch.tensor([[0.0, 2.0, -3.0], [1.0, 1.0, 1.0]], device=device)
    sigma = torch.sigmoid(logits.double())
    torch.testing.assert_close(
        timm_ext.ratios(logits).double(), sigma / sigma.sum(1, keepdim=True), atol=1e-7, rtol=0
    )
    softmax = torch.softmax(logits, 1)
    torch.testing.assert_close(timm_ext.ratios(logits, "softmax"), softmax, atol=1e-6, rtol=0)
    given = torch.tensor([[0.0, 1.0, 3.0]], device=device)
    assert timm_ext.ratios(given, "ratios").tolist() == [[0.0, 0.25, 0.75]]
