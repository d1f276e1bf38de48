"""The squared accumulation against its definition, and its messages."""

from collections.abc import Callable

import pytest
import torch

import timm_ext
from timm_ext.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(3, 5), (0,), (), (40_000,), (1,), (2, 3, 4, 5)]


def lists(dtype: torch.dtype, device: torch.device) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    grads = [torch.randn(shape).to(device, dtype) for shape in SHAPES]
    return [torch.rand(shape).to(device, wide) for shape in SHAPES], grads


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_is_that_of_the_reference(dtype: torch.dtype, device: torch.device) -> None:
    acc, grads = lists(dtype, device)
    wide_acc, wide_grads = ([t.cpu().double() for t in tensors] for tensors in (acc, grads))
    versions = [t._version for t in acc]
    timm_ext.square_accumulate_(acc, grads, 0.37)
    reference.square_accumulate_(wide_acc, wide_grads, 0.37)
    for got, expected, version in zip(acc, wide_acc, versions, strict=True):
        # Three roundings of float32, or of float64.
        torch.testing.assert_close(
            got.cpu().double(), expected, rtol=1e-15 if dtype == torch.float64 else 4 * 2.0**-24, atol=0
        )
        assert got._version > version


def test_by_hand_and_default_scale(device: torch.device) -> None:
    acc = [torch.tensor([1.0, 0.0], device=device)]
    timm_ext.square_accumulate_(acc, [torch.tensor([-3.0, 0.5], device=device)])
    assert acc[0].tolist() == [10.0, 0.25]


def test_the_scale_keeps_small_and_large_gradients_in_range(device: torch.device) -> None:
    acc = [torch.zeros(2, device=device)]
    timm_ext.square_accumulate_([acc[0][:1]], [torch.tensor([1e-22], device=device)], 1e10)
    timm_ext.square_accumulate_([acc[0][1:]], [torch.tensor([1e25], device=device)], 1e-20)
    assert acc[0].tolist() == pytest.approx([1e-34, 1e30], rel=1e-6)


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_any_scale(scale: float, device: torch.device) -> None:
    acc = [torch.ones(4, device=device)]
    timm_ext.square_accumulate_(acc, [torch.full((4,), 2.0, device=device)], scale)
    assert acc[0].tolist() == [1 + 4 * scale] * 4


def test_small_half_gradients_do_not_underflow(device: torch.device) -> None:
    grads = [torch.full((3,), 1e-4, dtype=torch.float16, device=device)]
    acc = [torch.zeros(3, device=device)]
    timm_ext.square_accumulate_(acc, grads)
    assert acc[0].tolist() == pytest.approx([1e-8] * 3, rel=1e-3)


def test_many_tensors_and_strided_gradients(device: torch.device) -> None:
    grads = [torch.randn(7, 3, device=device).T for _ in range(300)]
    acc = [torch.zeros(3, 7, device=device) for _ in grads]
    timm_ext.square_accumulate_(acc, grads)
    assert all(torch.equal(a, g * g) for a, g in zip(acc, grads, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("examples", [2, 130])
def test_gradients_of_several_examples_add_up_in_order(
    dtype: torch.dtype, examples: int, device: torch.device
) -> None:
    acc, grads = lists(dtype, device)
    grads += [torch.randn_like(grad) for _ in range(examples - 1) for grad in grads]
    expected, wide = [a.clone() for a in acc], [a.cpu().double() for a in acc]
    for first in range(0, len(grads), len(acc)):
        timm_ext.square_accumulate_(expected, grads[first : first + len(acc)], 0.37)
    timm_ext.square_accumulate_(acc, grads, 0.37)
    assert all(torch.equal(a, e) for a, e in zip(acc, expected, strict=True))
    reference.square_accumulate_(wide, [g.cpu().double() for g in grads], 0.37)
    for a, w in zip(acc, wide, strict=True):
        torch.testing.assert_close(a.cpu().double(), w, rtol=1e-5, atol=0)


def test_nothing_to_do() -> None:
    acc: list[torch.Tensor] = []
    timm_ext.square_accumulate_(acc, [])
    assert acc == []


def test_gradients_that_carry_a_graph_leave_none_behind() -> None:
    gradient = torch.ones(2, requires_grad=True) * 3
    acc = [torch.zeros(2)]
    timm_ext.square_accumulate_(acc, [gradient])
    assert not acc[0].requires_grad
    assert acc[0].tolist() == [9.0, 9.0]


Lists = tuple[list[torch.Tensor], list[torch.Tensor]]


def spoiled(spoil: Callable[[list[torch.Tensor], list[torch.Tensor]], object]) -> Lists:
    acc, grads = [torch.zeros(4) for _ in range(3)], [torch.ones(4) for _ in range(3)]
    spoil(acc, grads)
    return acc, grads


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda acc, grads: grads.pop(),
            r"grads must be as long a list as acc, or several .* \(got 2 for 3\)",
        ),
        (lambda acc, grads: grads.clear(), r"several times as long \(got 0 for 3\)"),
        (lambda acc, grads: acc.clear(), r"several times as long \(got 3 for 0\)"),
        (lambda acc, grads: grads.extend([torch.ones(4)]), r"several times as long \(got 4 for 3\)"),
        (
            lambda acc, grads: grads.extend([torch.ones(4), torch.ones(5), torch.ones(4)]),
            r"acc\[1\] must have the shape of grads\[4\]",
        ),
        (
            lambda acc, grads: acc.__setitem__(1, torch.zeros(5)),
            r"acc\[1\] must have the shape of grads\[1\] \(got \[5\] vs",
        ),
        (
            lambda acc, grads: acc.__setitem__(2, torch.zeros(4).half()),
            r"acc\[2\] must be float32 for gradients of float32",
        ),
        (
            lambda acc, grads: acc.__setitem__(2, torch.zeros(8)[::2]),
            r"acc\[2\] must be contiguous \(got strides \[2\]\)",
        ),
        (lambda acc, grads: acc.__setitem__(2, acc[0]), r"acc\[2\] must not share memory with acc\[0\]"),
        (lambda acc, grads: acc.__setitem__(1, grads[1]), r"acc\[1\] must not share memory with grads\[1\]"),
        (
            lambda acc, grads: grads.__setitem__(1, torch.ones(4).double()),
            r"grads\[1\] must have the dtype of grads\[0\]",
        ),
        (
            lambda acc, grads: grads.__setitem__(0, torch.ones(4).int()),
            r"grads\[0\] must be float32, bfloat16, float16 or",
        ),
    ],
)
def test_refuses(spoil: Callable[[list[torch.Tensor], list[torch.Tensor]], object], message: str) -> None:
    acc, grads = spoiled(spoil)
    before = [a.clone() for a in acc]
    with pytest.raises(RuntimeError, match=message):
        timm_ext.square_accumulate_(acc, grads)
    assert all(torch.equal(a, b) for a, b in zip(acc, before, strict=True))
