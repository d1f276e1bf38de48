"""Random tensors, views of them, and what counts as right or clear, for the kinds about operators."""

import random
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from timm_ext.errors import InputError

OWN_MESSAGE = re.compile(r"^[a-z_0-9]+: .+ must .+", re.DOTALL)
ERROR = 1e-5  # of the largest sum of absolute terms: chains of float32, Winograd's forms


def clear(call: Callable[[], Any]) -> Any:
    """Call an operator; its own refusals count as clear."""
    try:
        return call()
    except RuntimeError as error:
        if OWN_MESSAGE.match(str(error)):
            raise InputError(str(error)) from error
        raise


def drawn(rng: random.Random, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)


def view(rng: random.Random, values: Tensor) -> Tensor:
    """The same values within a larger tensor: with offset, steps, gaps, or axes in another order."""
    axes = values.ndim
    match rng.randrange(4):
        case 0:
            return values
        case 1:
            order = rng.sample(range(axes), axes)
            return values.permute(order).contiguous().permute([order.index(a) for a in range(axes)])
        case 2:
            steps = [rng.randint(1, 2) for _ in range(axes)]
            shape = [size * step for size, step in zip(values.shape, steps, strict=True)]
            wide = torch.full(shape, torch.nan if values.is_floating_point() else 7, dtype=values.dtype)
            part = wide[tuple(slice(None, None, step) for step in steps)]
            part.copy_(values)
            return part
        case _:
            gaps = [rng.randint(0, 3) for _ in range(axes)]
            shape = [size + gap for size, gap in zip(values.shape, gaps, strict=True)]
            wide = torch.full(shape, torch.nan if values.is_floating_point() else 7, dtype=values.dtype)
            part = wide[tuple(slice(gap, None) for gap in gaps)]
            part.copy_(values)
            return part


def assert_near(got: Tensor, expected: Tensor, scale: Tensor | float, error: float = ERROR) -> None:
    assert got.shape == expected.shape, f"{list(got.shape)} for {list(expected.shape)}"
    if got.numel():
        excess = (got.double() - expected).abs() - (error * scale + 1e-35)
        assert bool((excess <= 0).all()), f"{float(excess.max())} beyond the bound"


def sizes_of(rng: random.Random, axes: int, most: int) -> list[int]:
    most = rng.choice([2, 4, most])
    return [rng.randint(1, most) for _ in range(axes)]
