"""The operators of the Fisher information: squared gradients and sampled labels."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.library import register_fake

from timm_ext.ops.operands import check_tensors, integers, mark_changed, no_derivative, undifferentiated

Sampled = Literal["bernoulli", "categorical"]

_ops = torch.ops.timm_ext


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
        with undifferentiated():
            _ops.square_accumulate_.default(list(acc), list(grads), float(scale))
    except (RuntimeError, TypeError):
        _check_lists(acc, grads)  # only now: looking at every tensor takes as long as adding small ones
        raise
    mark_changed(acc)


def _check_lists(acc: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    named = {f"acc[{i}]": tensor for i, tensor in enumerate(acc)}
    check_tensors(**named, **{f"grads[{i}]": tensor for i, tensor in enumerate(grads)})


def _fake_square_accumulate(acc: list[Tensor], grads: list[Tensor], scale: float) -> None:
    _check_lists(acc, grads)  # one on `meta` brings all of them here


register_fake("timm_ext::square_accumulate_", _fake_square_accumulate)


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
    with undifferentiated():
        _ops.conv_weight_grad_square_.default(
            acc,
            grad,
            input,
            integers("stride", stride),
            integers("padding", padding),
            integers("dilation", dilation),
            integers("groups", [groups])[0],
            float(scale),
        )
    mark_changed([acc])


def _fake_conv_weight_grad_square(
    acc: Tensor,
    grad: Tensor,
    input: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    scale: float,
) -> None:
    return None


register_fake("timm_ext::conv_weight_grad_square_", _fake_conv_weight_grad_square)


def sample_labels(
    logits: Tensor, keys: Tensor, likelihood: Sampled, *, labels: bool = True
) -> tuple[Tensor, Tensor]:
    """Draw labels from a network's own prediction, with the gradient of their log-likelihood, in one pass.

        bernoulli:    y[b, k, v] = 1 with probability σ(z),             score = y − σ(z)
        categorical:  y[b, v] = k with probability softmax(z)[k],       score = onehot(y) − softmax(z)

    The random number of a variable comes from its example's key and its own place alone (Philox 4x32-10 by
    counter; Salmon et al., SC 2011), whatever the batch, the number of threads, the instruction set or the
    device. Not differentiable.

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
    with undifferentiated():
        drawn, score = _ops.sample_labels.default(logits, keys, likelihood, labels)
    return drawn, score


def _fake_sample_labels(
    logits: Tensor, keys: Tensor, likelihood: str, labels_wanted: bool
) -> tuple[Tensor, Tensor]:
    shape = list(logits.shape)
    if likelihood == "categorical":
        del shape[1]
    return keys.new_empty(shape if labels_wanted else (0,)), logits.new_empty(logits.shape)


register_fake("timm_ext::sample_labels", _fake_sample_labels)


for _name in ("conv_weight_grad_square_", "sample_labels", "square_accumulate_"):
    no_derivative(_name)
