"""Laws that every Fisher-weighted merge obeys, on inputs that hypothesis looks for."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import timm_ext

UNIT = 2.0**-24
values = st.floats(-1e6, 1e6, width=32)
fishers = st.one_of(st.just(0.0), st.floats(2.0**-130, 2.0**126, width=32))
logit_values = st.floats(-20, 20, width=32)


@st.composite
def merges(draw: st.DrawFn, models: int | None = None) -> tuple[torch.Tensor, ...]:
    """θ, F [T, P], logits [S, T] and offsets of a small merge."""
    count = models or draw(st.integers(1, 6))
    lengths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
    elements = sum(lengths)

    def table(element: st.SearchStrategy[float], rows: int, columns: int) -> torch.Tensor:
        flat = draw(st.lists(element, min_size=rows * columns, max_size=rows * columns))
        return torch.tensor(flat, dtype=torch.float32).view(rows, columns)

    return (
        table(values, count, elements),
        table(fishers, count, elements),
        table(logit_values, len(lengths), count),
        torch.tensor([0, *lengths]).cumsum(0),
    )


def spread(theta: torch.Tensor) -> float:
    return float(theta.abs().max()) + 1e-37


@given(merges())
def test_the_merge_lies_within_the_hull(inputs: tuple[torch.Tensor, ...]) -> None:
    merged = timm_ext.fused_merge(*inputs)
    assert bool((inputs[0].amin(0) <= merged).all())
    assert bool((merged <= inputs[0].amax(0)).all())


@given(merges())
def test_identical_models_merge_to_themselves(inputs: tuple[torch.Tensor, ...]) -> None:
    theta, *rest = inputs
    same = theta[:1].expand_as(theta).contiguous()
    assert torch.equal(timm_ext.fused_merge(same, *rest), same[0])


@given(merges(models=1))
def test_one_model_is_returned(inputs: tuple[torch.Tensor, ...]) -> None:
    assert torch.equal(timm_ext.fused_merge(*inputs), inputs[0][0])


@given(merges(), st.randoms(use_true_random=False))
def test_the_order_of_the_models_does_not_matter(inputs: tuple[torch.Tensor, ...], random: object) -> None:
    theta, fisher, logits, offsets = inputs
    order = list(range(theta.shape[0]))
    random.shuffle(order)  # type: ignore[attr-defined]
    merged = timm_ext.fused_merge(theta[order], fisher[order], logits[:, order].contiguous(), offsets)
    torch.testing.assert_close(merged, timm_ext.fused_merge(*inputs), rtol=0, atol=16 * UNIT * spread(theta))


@given(merges(), st.integers(-20, 20))
def test_scaling_all_fishers_changes_nothing(inputs: tuple[torch.Tensor, ...], exponent: int) -> None:
    theta, fisher, logits, offsets = inputs
    fisher = torch.where(fisher > 0, fisher.clamp(2.0**-100, 2.0**100), fisher)
    scaled = fisher * 2.0**exponent
    assert torch.equal(
        timm_ext.fused_merge(theta, scaled, logits, offsets),
        timm_ext.fused_merge(theta, fisher, logits, offsets),
    )


@given(merges())
def test_log_weight_gradients_add_up_to_zero(inputs: tuple[torch.Tensor, ...]) -> None:
    theta, fisher, logits, offsets = inputs
    rows = torch.ops.timm_ext.fused_merge_backward_log_weight(
        torch.ones(theta.shape[1]), theta, fisher, logits, offsets
    )
    bound = 32 * UNIT * spread(theta) * theta.shape[1]
    assert float(rows.sum(1).abs().max()) <= bound


@given(merges(), st.floats(-10, 10, width=32))
def test_shifting_softmax_logits_changes_little(inputs: tuple[torch.Tensor, ...], shift: float) -> None:
    theta, fisher, logits, offsets = inputs
    shifted = timm_ext.fused_merge(theta, fisher, logits + shift, offsets, mixing="softmax")
    plain = timm_ext.fused_merge(theta, fisher, logits, offsets, mixing="softmax")
    rounding = 2.0**-23 * (float(logits.abs().max()) + abs(shift))  # of the shifted logits themselves
    torch.testing.assert_close(shifted, plain, rtol=0, atol=(4 * rounding + 16 * UNIT) * spread(theta))


@given(st.lists(st.floats(-60, 60), min_size=1, max_size=8))
@settings(max_examples=200)
def test_log_sigmoid_is_that_of_the_math_library(logits: list[float]) -> None:
    rows = torch.ops.timm_ext.log_weights(torch.tensor([logits], dtype=torch.float64), "sigmoid")
    exact = [-math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x)) for x in logits]
    assert rows[0].tolist() == pytest.approx([value - max(exact) for value in exact], abs=1e-13)
