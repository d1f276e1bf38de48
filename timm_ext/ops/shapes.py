"""What the fake kernels refuse, in the words of the compiled ones.

A size that is a symbol, as under `torch.compile`, is taken for right: the compiled kernel will see its value.
"""

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from operator import mul
from typing import Any, NoReturn

import torch
from torch import Tensor

_LARGEST = 2**31 - 1
_FEW = 2**28


def require(op: str, expected: str, got: object, *conditions: Any) -> None:
    """Refuse where a condition is False; one of symbols is no bool.

    Raises:
        RuntimeError: `op: expected (got …)`.
    """
    if any(condition is False for condition in conditions):
        _refuse(f"{op}: {expected} (got {got})")


def _refuse(message: str) -> NoReturn:
    raise RuntimeError(message)


def are_known(*values: Any) -> bool:
    """Tell whether whole numbers, and the sizes and strides of tensors, hold no symbol."""
    for value in values:
        numbers = (*value.shape, *value.stride()) if isinstance(value, Tensor) else (value,)
        if not all(isinstance(number, int) for number in numbers):
            return False
    return True


def is_contiguous(tensor: Tensor) -> bool:
    """Tell whether a tensor is contiguous, as far as its sizes are known."""
    return not are_known(tensor) or tensor.is_contiguous()


def same_shape(one: Tensor, other: Tensor) -> tuple[Any, ...]:
    """Return the conditions that two tensors have the same shape."""
    return one.ndim == other.ndim, *(a == b for a, b in zip(one.shape, other.shape, strict=False))


def sizes_of(tensor: Tensor) -> list[int]:
    """Return sizes as messages show them."""
    return list(tensor.shape)


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype without its package."""
    return str(dtype).removeprefix("torch.")


def empty(like: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return an operator's result.

    Raises:
        RuntimeError: there is no tensor of such sizes.
    """
    if not are_known(*sizes):
        return like.new_empty(sizes)
    try:
        return like.new_empty(sizes)
    except RuntimeError:
        where = f"sizes must be those of a tensor for which there is memory on {like.device.type}"
        _refuse(f"timm_ext: {where} (got {list(sizes)} of {like.element_size()} bytes each)")


def check_dtype(op: str, name: str, tensor: Tensor, wanted: torch.dtype, why: str = "") -> None:
    """Refuse a tensor of another dtype."""
    require(op, f"{name} must be {name_of(wanted)}{why}", name_of(tensor.dtype), tensor.dtype == wanted)


def check_numbers(op: str, name: str, values: Sequence[int], axes: int, least: int) -> None:
    """Refuse what is not one number below 2³¹ for each axis."""
    given = list(values)
    expected = f"{name} must hold {axes} numbers >= {least}"
    require(op, expected, given, len(given) == axes, *(value >= least for value in given))
    require(op, f"{name} must hold numbers < 2^31", given, *(value <= _LARGEST for value in given))


def check_sizes(op: str, name: str, tensor: Tensor) -> None:
    """Refuse sizes of 2³¹ and more."""
    known = (size <= _LARGEST for size in tensor.shape)
    require(op, f"{name} must have sizes < 2^31", sizes_of(tensor), *known)


def check_volume(op: str, name: str, tensor: Tensor, axes: int = 5) -> None:
    """Refuse what is not float32 with so many axes."""
    check_dtype(op, name, tensor, torch.float32)
    check_axes(op, name, tensor, axes)


def check_axes(op: str, name: str, tensor: Tensor, axes: int) -> None:
    """Refuse another number of axes, and sizes that no kernel can reckon with."""
    require(op, f"{name} must have {axes} axes", sizes_of(tensor), tensor.ndim == axes)
    check_sizes(op, name, tensor)


def check_stored_volume(op: str, name: str, tensor: Tensor) -> None:
    """Refuse what is not `[B, C, D, H, W]` float32 or bfloat16."""
    stored = tensor.dtype in (torch.float32, torch.bfloat16)
    require(op, f"{name} must be float32 or bfloat16", name_of(tensor.dtype), stored)
    check_axes(op, name, tensor, 5)


def check_bias(op: str, bias: Tensor | None, outputs: int) -> None:
    """Refuse a bias that is not `[O]` float32, contiguous."""
    if bias is not None:
        check_volume(op, "bias", bias, 1)
        fits = bias.shape[0] == outputs, is_contiguous(bias)
        require(op, f"bias must be [{outputs}], contiguous", sizes_of(bias), *fits)


def check_padded(
    op: str, sizes: Sequence[int], padding: Sequence[int], channels: tuple[int, int], examples: int
) -> None:
    """Refuse padding for which there is no memory, and volumes that cannot be counted in 64 bits.

    Args:
        op: the operator.
        sizes: of the input, three numbers.
        padding: on both sides of each axis.
        channels: inputs and outputs.
        examples: of the batch.
    """
    if not are_known(*sizes, *padding, *channels, examples):
        return
    padded = [size + 2 * pad for size, pad in zip(sizes, padding, strict=True)]
    countable = all(product <= _LARGEST for product in accumulate(padded, mul))
    most = min(max(8 * prod(sizes), _FEW), _LARGEST) if countable else _FEW
    factors = 64, examples, max(channels), prod(padded)
    fits = countable and prod(padded) <= most and all(product < 2**63 for product in accumulate(factors, mul))
    expected = f"input with its padding must hold at most {most} elements for each channel"
    require(op, expected, f"{padded} for {channels[0]} channels", fits)


def convolved(
    op: str,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Return the sizes of a convolution's output `[D', H', W']`; refuses a volume smaller than the kernel."""
    axes = zip(input.shape[2:], padding, weight.shape[2:], dilation, strict=True)
    free = [size + 2 * pad - gap * (kernel - 1) - 1 for size, pad, kernel, gap in axes]
    require(
        op,
        "input with its padding must be at least as large as the kernel",
        f"{sizes_of(input)} with padding {list(padding)} for a kernel {sizes_of(weight)}",
        *(size >= 1 for size in input.shape[2:]),
        *(left >= 0 for left in free),
    )
    return [left // step + 1 for left, step in zip(free, stride, strict=True)]
