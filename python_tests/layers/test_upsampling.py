"""Upsampling under `fast_layers`: which is taken, and its gradients."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import timm_ext

TAKEN: list[dict[str, Any]] = [
    {"scale_factor": 2, "mode": "trilinear"},
    {"scale_factor": (2.0, 2.0, 2.0), "mode": "trilinear", "align_corners": False},
    {"size": (6, 8, 10), "mode": "trilinear", "align_corners": False},
    {"scale_factor": 2},
]
LEFT: list[dict[str, Any]] = [
    {"scale_factor": 2, "mode": "trilinear", "align_corners": True},
    {"scale_factor": (2, 2, 1), "mode": "trilinear"},
    {"scale_factor": 3, "mode": "trilinear"},
    {"size": (6, 8, 11), "mode": "trilinear"},
]


def volume() -> Tensor:
    return torch.randn(2, 3, 3, 4, 5, generator=torch.Generator().manual_seed(0))


def run(options: dict[str, Any], x: Tensor, *, fast: bool) -> tuple[Tensor, Tensor, str]:
    x = x.detach().requires_grad_()
    with timm_ext.fast_layers() if fast else nullcontext():
        output = functional.interpolate(x, **options)
        output.sin().sum().backward()
    return output.detach(), x.grad, output.grad_fn.name()


@pytest.mark.parametrize("options", TAKEN + LEFT, ids=str)
def test_gradients_are_those_of_float64(options: dict[str, Any]) -> None:
    expected = run(options, volume().double(), fast=False)
    found = run(options, volume(), fast=True)
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()
    assert found[2].endswith("NodeBackward") == (options in TAKEN)


def test_transforms_and_other_types_run_as_they_are() -> None:
    options = TAKEN[0]
    expected = torch.func.grad(lambda z: functional.interpolate(z, **options).sin().sum())(volume())
    with timm_ext.fast_layers():
        found = torch.func.grad(lambda z: functional.interpolate(z, **options).sin().sum())(volume())
    assert torch.equal(found, expected)
    for dtype in (torch.float64, torch.bfloat16):
        x = volume().to(dtype)
        output, gradient, node = run(options, x, fast=True)
        assert node == "UpsampleTrilinear3DBackward0"
        assert all(map(torch.equal, (output, gradient), run(options, x, fast=False)[:2]))


def test_without_gradients_the_values_are_the_same() -> None:
    expected = run(TAKEN[0], volume(), fast=True)[0]
    with timm_ext.fast_layers(), torch.no_grad():
        assert torch.equal(functional.interpolate(volume(), **TAKEN[0]), expected)


def test_a_factor_for_each_axis_is_asked_for() -> None:
    with timm_ext.fast_layers(), pytest.raises(ValueError, match="scale_factor"):
        functional.interpolate(volume(), scale_factor=(2.0,), mode="trilinear")
