"""Log-weights of the merge from mixing logits: the operator, its gradient, and their derivatives."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.library import register_kernel

from timm_ext.ops import merge_formulas as formulas
from timm_ext.ops.autograd import below_autograd, call, defined_by, nested, one_by_one, primals, register
from timm_ext.ops.operands import fake_kernel
from timm_ext.ops.shapes import check_dtype, empty, name_of, require, same_shape, sizes_of

_ops = torch.ops.timm_ext


def log_weights(logits: Tensor, mixing: str) -> Tensor:
    """Return log f(δ) less the largest of its row, f being σ, exp or the identity, `[G, T]`."""
    if torch.compiler.is_compiling():
        compiled: Tensor = _ops.log_weights.default(logits, mixing)
        return compiled
    weights: Tensor = call(_LogWeights, logits, mixing)
    return weights


class _LogWeights(Function):
    @staticmethod
    def forward(logits: Tensor, mixing: str) -> Tensor:
        weights: Tensor = below_autograd(_ops.log_weights.default, logits, mixing)
        return weights

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        logits, ctx.mixing = inputs
        ctx.save_for_backward(logits)
        ctx.save_for_forward(logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return call(_GradientOfLogits, grad, *ctx.saved_tensors, ctx.mixing), None

    @staticmethod
    @nested
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        (logits,) = primals(ctx)
        along = tangent * formulas.slope(logits, ctx.mixing)
        return along - (formulas.largest(logits) * along).sum(1, keepdim=True)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        return one_by_one(_LogWeights, info.batch_size, in_dims, inputs), 0


_GradientOfLogits = defined_by(_ops.log_weights_backward.default, formulas.gradient_of_logits)

register("log_weights", _LogWeights)
register("log_weights_backward", _GradientOfLogits)


@fake_kernel("log_weights")
def _(logits: Tensor, mixing: str) -> Tensor:
    _check(logits, mixing)
    return empty(logits, logits.shape)


@fake_kernel("log_weights_backward")
def _(grad: Tensor, logits: Tensor, mixing: str) -> Tensor:
    _check(logits, mixing)
    check_dtype("log_weights", "grad", grad, logits.dtype, " like logits")
    shapes = f"{sizes_of(grad)} vs {sizes_of(logits)}"
    require("log_weights", "grad must have the shape of logits", shapes, *same_shape(grad, logits))
    return empty(logits, logits.shape)


def _check(logits: Tensor, mixing: str) -> None:
    op, known = "log_weights", mixing in ("sigmoid", "softmax", "ratios")
    require(op, "mixing must be 'sigmoid', 'softmax' or 'ratios'", f"'{mixing}'", known)
    fits = logits.ndim == 2 and logits.shape[1] >= 1
    require(op, "logits must be [G, T] with T >= 1", sizes_of(logits), fits)
    floating = logits.dtype in (torch.float32, torch.float64)
    require(op, "logits must be float32 or float64", name_of(logits.dtype), floating)


def _log_weights_on_cuda(logits: Tensor, mixing: str) -> Tensor:
    """Compute in plain PyTorch: its log-sigmoid gives the same bits in every run, on CUDA only."""
    _check(logits, mixing)
    logits = logits.contiguous()
    if mixing == "sigmoid":
        values = torch.nn.functional.logsigmoid(logits)
    elif mixing == "softmax":
        values = logits
    else:
        values = logits.log()  # -inf for 0, NaN below
    return values - values.amax(1, keepdim=True)


register_kernel("timm_ext::log_weights", "cuda", _log_weights_on_cuda)
register_kernel("timm_ext::log_weights_backward", "cuda", formulas.gradient_of_logits)
