"""The operators: for each a documented wrapper, its fake (meta) kernel and its gradient.

Argument errors found by the compiled operators are `RuntimeError`s that read "op: X must ... (got ...)".
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake, register_kernel

from timm_ext import reference
from timm_ext.errors import InputError

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
    pass each; the value lies within the models' range, is exact where they agree, and is the α-weighted mean
    where all F are 0. The same bits for any number of threads and any instruction set.

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
        out: where to write the result, `[P]` of theta's dtype; without gradient.

    Returns:
        The merged parameters `[P]`.

    Raises:
        InputError: mixing is unknown, logits, offsets and groups do not fit, tensors lie on different
            devices, or `out` is given where a gradient is wanted.
    """
    _check_devices(theta, fisher=fisher, logits=logits, offsets=offsets, groups=groups, out=out)
    _check_rows(theta, logits, offsets, mixing, groups)
    dtype = torch.float64 if theta.dtype == torch.float64 else torch.float32
    rows = _ops.log_weights.default(logits.to(dtype), mixing)
    if groups is not None:
        rows = torch.nn.functional.embedding(groups, rows)
    if out is None:
        merged: Tensor = _ops.fused_merge.default(theta, fisher, rows, offsets)
        return merged
    _refuse_gradient(theta, fisher, logits, out)
    _ops.fused_merge.out(theta, fisher, rows, offsets, out=out)
    _mark_changed([out])
    return out


def _check_devices(theta: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != theta.device:
            raise InputError(
                f"{name}: expected a tensor on the device of theta, {theta.device} (got {tensor.device})"
            )


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
    if groups.device.type == "cpu" and segments > 0 and not torch.compiler.is_compiling():
        lowest, highest = (int(bound) for bound in groups.aminmax())
        if lowest < 0 or highest >= logits.shape[0]:
            raise InputError(
                f"groups: expected rows of logits, 0 to {logits.shape[0] - 1} (got {lowest} to {highest})"
            )


def _refuse_gradient(*inputs: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        raise InputError("out: expected no tensor that requires a gradient (got one; use torch.no_grad())")


def _mark_changed(tensors: Sequence[Tensor]) -> None:
    """Let autograd notice when a tensor that it saved was overwritten."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])


def _fake_merge(theta: Tensor, fisher: Tensor | None, log_weight: Tensor, offsets: Tensor) -> Tensor:
    return theta.new_empty(theta.shape[1])


register_fake("timm_ext::fused_merge", _fake_merge)


def _fake_merge_out(
    theta: Tensor, fisher: Tensor | None, log_weight: Tensor, offsets: Tensor, *, out: Tensor
) -> None:
    return None


register_fake("timm_ext::fused_merge.out", _fake_merge_out)


def _fake_merge_rows(
    grad: Tensor, theta: Tensor, fisher: Tensor | None, log_weight: Tensor, offsets: Tensor
) -> Tensor:
    return log_weight.new_empty(log_weight.shape)


register_fake("timm_ext::fused_merge_backward_log_weight", _fake_merge_rows)


def _fake_merge_planes(
    grad: Tensor,
    theta: Tensor,
    fisher: Tensor | None,
    log_weight: Tensor,
    offsets: Tensor,
    theta_wanted: bool,
    fisher_wanted: bool,
) -> tuple[Tensor, Tensor]:
    return (
        theta.new_empty(theta.shape if theta_wanted else (0,)),
        theta.new_empty(theta.shape if fisher_wanted else (0,)),
    )


register_fake("timm_ext::fused_merge_backward_planes", _fake_merge_planes)


def _save_merge(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _merge_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    theta_wanted, fisher_wanted, rows_wanted, _ = ctx.needs_input_grad
    grad_rows = _ops.fused_merge_backward_log_weight.default(grad, *inputs) if rows_wanted else None
    if not (theta_wanted or fisher_wanted):
        return None, None, grad_rows, None
    planes = _ops.fused_merge_backward_planes.default(grad, *inputs, theta_wanted, fisher_wanted)
    return planes[0] if theta_wanted else None, planes[1] if fisher_wanted else None, grad_rows, None


register_autograd("timm_ext::fused_merge", _merge_backward, setup_context=_save_merge)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    return None


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise NotImplementedError("fused_merge: expected one differentiation (got a second, of its gradient)")


for _name in ("fused_merge_backward_log_weight", "fused_merge_backward_planes", "log_weights_backward"):
    register_autograd(f"timm_ext::{_name}", _no_second_derivative, setup_context=_save_nothing)


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
    if mixing not in MIXINGS:
        raise InputError(f"mixing: expected one of {', '.join(map(repr, MIXINGS))} (got {mixing!r})")
    if logits.ndim != 2:
        raise InputError(f"logits: expected [G, T] (got {list(logits.shape)})")
    return torch.softmax(_ops.log_weights.default(logits.double(), mixing), dim=1).to(logits.dtype)


def _fake_log_weights(logits: Tensor, mixing: str) -> Tensor:
    return logits.new_empty(logits.shape)


register_fake("timm_ext::log_weights", _fake_log_weights)


def _fake_log_weights_backward(grad: Tensor, logits: Tensor, mixing: str) -> Tensor:
    return logits.new_empty(logits.shape)


register_fake("timm_ext::log_weights_backward", _fake_log_weights_backward)


def _cuda_log_weights(logits: Tensor, mixing: str) -> Tensor:
    return reference.log_weights(logits.contiguous(), mixing)


register_kernel("timm_ext::log_weights", "cuda", _cuda_log_weights)


def _cuda_log_weights_backward(grad: Tensor, logits: Tensor, mixing: str) -> Tensor:
    largest = torch.nn.functional.one_hot(logits.argmax(1), logits.shape[1])
    inner = grad - largest * grad.sum(1, keepdim=True)
    if mixing == "softmax":
        return inner
    slope = torch.sigmoid(-logits) if mixing == "sigmoid" else torch.where(logits == 0, 0, 1 / logits)
    return inner * slope


register_kernel("timm_ext::log_weights_backward", "cuda", _cuda_log_weights_backward)


def _save_logits(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, ctx.mixing = inputs
    ctx.save_for_backward(logits)


def _log_weights_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _ops.log_weights_backward.default(grad, *ctx.saved_tensors, ctx.mixing), None


register_autograd("timm_ext::log_weights", _log_weights_backward, setup_context=_save_logits)


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
    with torch.no_grad():
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
    with torch.no_grad():
        _ops.conv_weight_grad_square_.default(
            acc, grad, input, list(stride), list(padding), list(dilation), groups, float(scale)
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
    with torch.no_grad():
        drawn, score = _ops.sample_labels.default(logits.detach(), keys, likelihood, labels)
    return drawn, score


def _fake_sample_labels(
    logits: Tensor, keys: Tensor, likelihood: str, labels_wanted: bool
) -> tuple[Tensor, Tensor]:
    shape = list(logits.shape)
    if likelihood == "categorical":
        del shape[1]
    return keys.new_empty(shape if labels_wanted else (0,)), logits.new_empty(logits.shape)


register_fake("timm_ext::sample_labels", _fake_sample_labels)
