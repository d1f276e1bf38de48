"""The operators: for each a documented wrapper and its fake kernel; the merge's gradients are in `merge_ops`.

Argument errors found by the compiled operators are `RuntimeError`s that read "op: X must ... (got ...)".
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.library import register_fake

from timm_ext.errors import InputError
from timm_ext.merge_ops import log_weights, merge
from timm_ext.operands import (
    check_tensors,
    integers,
    no_derivative,
    refuse_tangents,
    traced,
    transformed,
    undifferentiated,
)

Mixing = Literal["sigmoid", "softmax", "ratios"]
Sampled = Literal["bernoulli", "categorical"]
MIXINGS: tuple[Mixing, ...] = ("sigmoid", "softmax", "ratios")

_ops = torch.ops.timm_ext


def fused_merge(
    theta: Tensor,
    fisher: Tensor | None,
    logits: Tensor,
    offsets: Tensor,
    *,
    mixing: Mixing = "sigmoid",
    groups: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Merge T models by their Fishers and by mixing ratios that are shared within groups of elements.

        merged[p] = Σ_t α[g, t] F[t, p] θ[t, p] / Σ_t α[g, t] F[t, p]        for p in a segment of group g

    with α[g, t] ∝ σ(δ[g, t]) for logits δ. This is T-IMM (Geyer et al., MIDL 2019, eq. 4); equal logits make
    it mode-IMM (Lee et al., NeurIPS 2017), `fisher=None` a weighted mean. Differentiable in θ, F and δ in one
    pass each, any number of times, in reverse and in forward mode and under the transforms of `torch.func`
    (`vmap` calls it example by example); the value lies within the models' range, is exact where they agree,
    and is the α-weighted mean where all F are 0. The same bits for any number of threads and any instruction
    set.

    Args:
        theta: parameters `[T, P]`, float32, bfloat16, float16 (computed in float32) or float64. Rows may lie
            further apart than P.
        fisher: diagonal Fishers `[T, P]`, non-negative and finite, of theta's dtype; None stands for 1.
        logits: mixing logits δ `[G, T]`.
        offsets: int64 `[S + 1]`, strictly increasing from 0 to P: segment s holds the elements from
            `offsets[s]` up to `offsets[s + 1]`. The values are checked on the CPU only.
        mixing: how logits give ratios: `"sigmoid"` σ(δ), `"softmax"` exp(δ), `"ratios"` δ itself (δ >= 0, and
            0 leaves the model out); each divided by its sum over the models. Ratios below 2^-100 of the
            largest count as 0. A row with NaN or without any positive ratio gives NaN.
        groups: int64 `[S]`, each segment's row of logits; None: segment s has row s.
        out: where to write the result, `[P]` of theta's dtype; without gradient, tangent or transform.

    Returns:
        The merged parameters `[P]`.

    Raises:
        InputError: mixing is unknown, logits, offsets and groups do not fit, what is given is no tensor or
            lies on another device, or `out` is given where a derivative or a transform is wanted.
    """
    optional = {"fisher": fisher, "groups": groups, "out": out}
    check_tensors(optional, theta=theta, logits=logits, offsets=offsets)
    _check_rows(theta, logits, offsets, mixing, groups)
    if out is not None:
        _refuse_derivatives(theta, fisher, logits, out)
    dtype = torch.float64 if theta.dtype == torch.float64 else torch.float32
    rows = log_weights(logits.to(dtype), mixing)
    if groups is not None:
        rows = torch.nn.functional.embedding(groups, rows)
    if out is None:
        return merge(theta, fisher, rows, offsets)
    _ops.fused_merge.out(theta, fisher, rows, offsets, out=out)
    _mark_changed([out])
    return out


def _check_rows(theta: Tensor, logits: Tensor, offsets: Tensor, mixing: str, groups: Tensor | None) -> None:
    if mixing not in MIXINGS:
        raise InputError(f"mixing: expected one of {', '.join(map(repr, MIXINGS))} (got {mixing!r})")
    if logits.ndim != 2 or theta.ndim != 2 or logits.shape[1] != theta.shape[0]:
        raise InputError(
            f"logits: expected [G, T] for theta [T, P] (got {list(logits.shape)} for {list(theta.shape)})"
        )
    if not logits.is_floating_point():
        raise InputError(f"logits: expected floating-point numbers (got {logits.dtype})")
    if offsets.ndim != 1 or offsets.numel() == 0:
        raise InputError(f"offsets: expected [S + 1] (got {list(offsets.shape)})")
    if offsets.dtype != torch.int64:
        raise InputError(f"offsets: expected torch.int64 (got {offsets.dtype})")
    segments = offsets.numel() - 1
    if groups is None:
        if logits.shape[0] != segments:
            raise InputError(
                f"logits: expected one row for each of the {segments} segments, or groups that name each "
                f"segment's row (got {logits.shape[0]} rows)"
            )
        return
    if groups.dtype != torch.int64 or groups.ndim != 1 or groups.shape[0] != segments:
        raise InputError(
            f"groups: expected int64 [S] = [{segments}] (got {groups.dtype} {list(groups.shape)})"
        )
    if transformed():
        _check_rows_of_batch(groups, logits.shape[0])
    elif groups.device.type == "cpu" and not traced():
        _check_rows_are_there(groups, logits.shape[0])


def _check_rows_are_there(groups: Tensor, rows: int) -> None:
    if groups.numel() == 0:
        return
    lowest, highest = (int(bound) for bound in groups.aminmax())
    if lowest < 0 or highest >= rows:
        raise InputError(f"groups: expected rows of logits, 0 to {rows - 1} (got {lowest} to {highest})")


def _check_rows_of_batch(groups: Tensor, rows: int) -> Tensor:
    checked: Tensor = _RowsThatAre.apply(groups, rows)  # type: ignore[no-untyped-call]
    return checked


class _RowsThatAre(Function):
    """The check of groups' values under `torch.func`, where a batch shows its values to no one else."""

    @staticmethod
    def forward(groups: Tensor, rows: int) -> Tensor:
        if groups.device.type == "cpu" and not traced():
            _check_rows_are_there(groups, rows)
        return groups.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        return None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], groups: Tensor, rows: int
    ) -> tuple[Tensor, int | None]:
        return _check_rows_of_batch(groups, rows), in_dims[0]


def _refuse_derivatives(*inputs: Tensor | None) -> None:
    if transformed():
        raise InputError("out: expected no transform of torch.func around the call (got one)")
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        raise InputError("out: expected no tensor that requires a gradient (got one; use torch.no_grad())")
    refuse_tangents("fused_merge with out", inputs)


def _mark_changed(tensors: Sequence[Tensor]) -> None:
    """Let autograd notice when a tensor that it saved was overwritten."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])


def ratios(logits: Tensor, mixing: Mixing = "sigmoid") -> Tensor:
    """Return the mixing ratios α that `fused_merge` uses for logits δ.

        α[g, t] = f(δ[g, t]) / Σ_j f(δ[g, j]),      f = σ, exp or the identity by `mixing`

    Args:
        logits: mixing logits `[G, T]`.
        mixing: as in `fused_merge`.

    Returns:
        Ratios `[G, T]` of the logits' dtype; rows add up to 1.

    Raises:
        InputError: mixing is unknown or logits is not `[G, T]`.
    """
    check_tensors(logits=logits)
    if mixing not in MIXINGS:
        raise InputError(f"mixing: expected one of {', '.join(map(repr, MIXINGS))} (got {mixing!r})")
    if logits.ndim != 2:
        raise InputError(f"logits: expected [G, T] (got {list(logits.shape)})")
    return torch.softmax(log_weights(logits.double(), mixing), dim=1).to(logits.dtype)


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
    for name, tensors in (("acc", acc), ("grads", grads)):
        if not all(isinstance(tensor, Tensor) for tensor in tensors):
            check_tensors(**{f"{name}[{i}]": tensor for i, tensor in enumerate(tensors)})
    if len({tensor.device for tensor in (*acc, *grads)}) > 1:
        named = {f"acc[{i}]": tensor for i, tensor in enumerate(acc)}
        check_tensors(**named, **{f"grads[{i}]": tensor for i, tensor in enumerate(grads)})
    if not acc and not grads:
        return  # the dispatcher finds no device in empty lists
    with undifferentiated():
        _ops.square_accumulate_.default(list(acc), list(grads), float(scale))
    _mark_changed(acc)


def _fake_square_accumulate(acc: list[Tensor], grads: list[Tensor], scale: float) -> None:
    return None


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
    _mark_changed([acc])


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


for _name in ("conv_weight_grad_square_", "fused_merge.out", "sample_labels", "square_accumulate_"):
    no_derivative(_name)
