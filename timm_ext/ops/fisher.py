"""The operators of the Fisher information: squared gradients and sampled labels. None is differentiable."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from timm_ext.ops.operands import Operator, check_tensors, integers, mark_changed
from timm_ext.ops.shapes import (
    check_dtype,
    check_numbers,
    check_padded,
    check_sizes,
    empty,
    is_contiguous,
    name_of,
    require,
    same_shape,
    sizes_of,
)

Sampled = Literal["bernoulli", "categorical"]

_FLOATING = torch.float32, torch.bfloat16, torch.float16, torch.float64

_square_accumulate = Operator[None]("square_accumulate_")
_conv_weight_grad_square = Operator[None]("conv_weight_grad_square_")
_sample_labels = Operator[tuple[Tensor, Tensor]]("sample_labels")


def square_accumulate_(acc: Sequence[Tensor], grads: Sequence[Tensor], scale: float = 1.0) -> None:
    """Add scaled squares to a list of accumulators in place, in one launch for each 120 gradients.

        acc[i] += scale · Σ_j grads[j · n + i]²        for a list of n accumulators

    Args:
        acc: accumulators, contiguous, no two overlapping; float32, or float64 for float64 gradients.
        grads: of the same shapes, one for each accumulator, or those of several examples one after another;
            float32, bfloat16, float16 or float64, all alike; no copy in another dtype is made.
        scale: factor of the squares; applied before squaring, so that small and large gradients keep their
            precision.
    """
    if not acc and not grads:
        return  # the dispatcher finds no device in empty lists
    try:
        _square_accumulate(list(acc), list(grads), float(scale))
    except (RuntimeError, TypeError):  # nothing is looked at that the operator looks at itself
        named = {f"acc[{i}]": tensor for i, tensor in enumerate(acc)}
        check_tensors(**named, **{f"grads[{i}]": tensor for i, tensor in enumerate(grads)})
        raise
    mark_changed(acc)


@_square_accumulate.fake
def _(acc: list[Tensor], grads: list[Tensor], scale: float) -> None:
    op, count = _square_accumulate.name, len(acc)
    each = len(grads) // count if count else 0
    whole = each * count == len(grads) and (each > 0 or not count)
    expected = "grads must be as long a list as acc, or several times as long"
    require(op, expected, f"{len(grads)} for {count}", whole)
    for k, grad in enumerate(grads):
        _check_item(op, k, grad, grads[0], k % count, acc[k % count])


def _check_item(op: str, k: int, grad: Tensor, first: Tensor, i: int, acc: Tensor) -> None:
    dtype, got = grad.dtype, name_of(grad.dtype)
    require(op, f"grads[{k}] must be float32, bfloat16, float16 or float64", got, dtype in _FLOATING)
    alike = f"{got} vs {name_of(first.dtype)}"
    require(op, f"grads[{k}] must have the dtype of grads[0]", alike, dtype == first.dtype)
    for name, tensor in ((f"grads[{k}]", grad), (f"acc[{i}]", acc)):
        places = f"{tensor.device} vs {first.device}"
        require(op, f"{name} must be on the device of grads[0]", places, tensor.device == first.device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    check_dtype(op, f"acc[{i}]", acc, wide, f" for gradients of {got}")
    shapes = f"{sizes_of(acc)} vs {sizes_of(grad)}"
    require(op, f"acc[{i}] must have the shape of grads[{k}]", shapes, *same_shape(acc, grad))
    strides = f"strides {list(acc.stride())}"
    require(op, f"acc[{i}] must be contiguous", strides, is_contiguous(acc))


def conv_weight_grad_square_(
    acc: Tensor,
    grad: Tensor,
    input: Tensor,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    scale: float = 1.0,
) -> None:
    """Add the squares of a convolution's weight gradients, example by example, without storing any.

        acc += scale · Σ_b (∂ Σ(grad_b · output_b) / ∂ weight)²

    The gradient at tap k is Σ_p grad[b, o, p] · input[b, i, p · stride + k · dilation − padding], with zeros
    outside of the input. For a transposed convolution exchange `grad` and `input`. Arithmetic is IEEE
    float32, never TF32; errors stay below 1e-5 of the largest element. The same bits for any number of
    threads, and on CUDA in every run. The CUDA kernels take up to 64 MiB of workspace; they are compiled, and
    run on the host executor of the C++ tests.

    Args:
        acc: `[O, I / groups, k...]` float32, contiguous; one to three axes.
        grad: gradient of the output, `[B, O, ...]` float32; on CUDA also bfloat16 or float16.
        input: of the convolution, `[B, I, ...]`, of grad's dtype.
        stride: one number for each axis, like the following.
        padding: zeros on both sides.
        dilation: distance of the taps.
        groups: of the convolution.
        scale: factor of the squares.
    """
    check_tensors(acc=acc, grad=grad, input=input)
    numbers = integers("stride", stride), integers("padding", padding), integers("dilation", dilation)
    whole = integers("groups", [groups])[0]
    _conv_weight_grad_square(acc, grad, input, *numbers, whole, float(scale))
    mark_changed([acc])


@_conv_weight_grad_square.fake
def _(
    acc: Tensor,
    grad: Tensor,
    input: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    scale: float,
) -> None:
    op = _conv_weight_grad_square.name
    check_dtype(op, "acc", acc, torch.float32)
    if acc.device.type != "cuda":
        check_dtype(op, "grad", grad, torch.float32, " on the CPU")
    expected = "grad must be float32, bfloat16 or float16"
    require(op, expected, name_of(grad.dtype), grad.dtype in _FLOATING[:3])
    check_dtype(op, "input", input, grad.dtype, " like grad")
    expected = "acc must be [O, I / groups, ...] with one to three axes, contiguous"
    require(op, expected, sizes_of(acc), 3 <= acc.ndim <= 5, is_contiguous(acc))
    check_sizes(op, "acc", acc)
    for name, tensor in (("grad", grad), ("input", input)):
        as_many = f"{name} must have as many axes as acc, {acc.ndim}"
        require(op, as_many, sizes_of(tensor), tensor.ndim == acc.ndim)
        check_sizes(op, name, tensor)
    axes = acc.ndim - 2
    check_numbers(op, "stride", stride, axes, 1)
    check_numbers(op, "padding", padding, axes, 0)
    check_numbers(op, "dilation", dilation, axes, 1)
    _check_channels(op, acc, grad, input, groups)
    _check_reach(op, acc, grad, input, stride, padding, dilation)
    missing = 3 - axes
    channels = acc.shape[1], acc.shape[0] // groups
    check_padded(op, [1] * missing + sizes_of(input)[2:], [0] * missing + padding, channels, grad.shape[0])


def _check_channels(op: str, acc: Tensor, grad: Tensor, input: Tensor, groups: int) -> None:
    outputs = acc.shape[0]
    known = isinstance(groups, int)
    divide = not known or (1 <= groups < 2**31 and outputs % groups == 0)
    require(op, f"groups must divide the channels of grad, {outputs}", groups, divide)
    require(
        op,
        "acc, grad and input must be [O, I / groups, ...], [B, O, ...] and [B, I, ...]",
        f"{sizes_of(acc)}, {sizes_of(grad)} and {sizes_of(input)} in {groups} groups",
        grad.shape[0] == input.shape[0],
        grad.shape[1] == outputs,
        input.shape[1] == acc.shape[1] * groups,
    )


def _check_reach(
    op: str,
    acc: Tensor,
    grad: Tensor,
    input: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> None:
    axes = zip(grad.shape[2:], stride, acc.shape[2:], dilation, input.shape[2:], padding, strict=True)
    fits = [
        (points - 1) * step + (taps - 1) * gap + 1 <= size + 2 * pad
        for points, step, taps, gap, size, pad in axes
    ]
    got = f"{sizes_of(grad)} for input {sizes_of(input)}"
    require(op, "grad must have no larger sizes than the output", got, *fits)


def sample_labels(
    logits: Tensor, keys: Tensor, likelihood: Sampled, *, labels: bool = True
) -> tuple[Tensor, Tensor]:
    """Draw labels from a network's own prediction, with the gradient of their log-likelihood, in one pass.

        bernoulli:    y[b, k, v] = 1 with probability σ(z),             score = y − σ(z)
        categorical:  y[b, v] = k with probability softmax(z)[k],       score = onehot(y) − softmax(z)

    The random number of a variable comes from its example's key and its own place alone (Philox 4x32-10 by
    counter; Salmon et al., SC 2011), whatever the batch, the number of threads, the instruction set or the
    device.

    Args:
        logits: z `[B, K, ...]`, float32 or float64.
        keys: int64 `[B]`, on the device of the logits; one for each example, such as a hash of seed and name.
        likelihood: `"bernoulli"` or `"categorical"`.
        labels: whether the labels are wanted; otherwise they come back empty.

    Returns:
        Labels y, int64, of the logits' shape (bernoulli) or `[B, ...]` (categorical), and the score, of the
        logits' shape and dtype.
    """
    check_tensors(logits=logits, keys=keys)
    return _sample_labels(logits, keys, likelihood, labels)


@_sample_labels.fake
def _(logits: Tensor, keys: Tensor, likelihood: str, labels_wanted: bool) -> tuple[Tensor, Tensor]:
    op, known = _sample_labels.name, ("bernoulli", "categorical")
    require(op, "likelihood must be 'bernoulli' or 'categorical'", f"'{likelihood}'", likelihood in known)
    fits = logits.ndim >= 2 and logits.shape[1] >= 1
    require(op, "logits must be [B, K, ...] with K >= 1", sizes_of(logits), fits)
    floating = logits.dtype in (torch.float32, torch.float64)
    require(op, "logits must be float32 or float64", name_of(logits.dtype), floating)
    check_dtype(op, "keys", keys, torch.int64)
    examples = logits.shape[0]
    one_each = keys.ndim == 1 and keys.shape[0] == examples
    require(op, f"keys must be [B] = [{examples}]", sizes_of(keys), one_each)
    shape = sizes_of(logits)
    if likelihood == "categorical":
        del shape[1]
    return empty(keys, shape if labels_wanted else (0,)), empty(logits, logits.shape)
