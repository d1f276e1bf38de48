"""Arithmetic of a Fisher estimate, set for its duration only."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from timm_ext.errors import InputError

_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_EPSILON = {"tf32": 2.0**-10, "bf16-mixed": 2.0**-8, "16-mixed": 2.0**-10}
PRECISIONS = ("ieee", *_EPSILON)


def check_precision(precision: str) -> None:
    """Refuse a precision that is not one of `PRECISIONS`.

    Raises:
        InputError: naming those there are.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision: expected one of {', '.join(PRECISIONS)} (got {precision!r})")


def tolerance(precision: str, dtype: torch.dtype) -> float:
    """Return the relative difference that rounding alone may make between two ways to the same logits."""
    return float(_EPSILON.get(precision, torch.finfo(dtype).eps) ** 0.5)


@contextmanager
def precise(precision: str, device: torch.device) -> Iterator[None]:
    """Set products and convolutions to a precision; cuDNN's default TF32 would cost about 1e-3 of a Fisher.

    Args:
        precision: `ieee` (the parameters' own type), `tf32` (on CUDA, all by cuDNN and cuBLAS: the fused
            kernels know only IEEE arithmetic), `bf16-mixed` or `16-mixed` (autocast).
        device: of the model.
    """
    wanted = "tf32" if precision == "tf32" else "ieee"
    cudnn: Any = torch.backends.cudnn
    backends = [cudnn.conv, torch.backends.cuda.matmul] if device.type == "cuda" else []
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = wanted
    # The caller's own autocast would make another precision of it, also in the backward.
    ambient = torch.is_autocast_enabled(device.type)
    try:
        with torch.autocast(device.type, enabled=False) if ambient else nullcontext():
            yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value


@contextmanager
def autocast(precision: str, device: torch.device) -> Iterator[None]:
    """Run a forward under autocast where the precision is a mixed one."""
    if precision not in _AUTOCAST:
        yield
        return
    with torch.autocast(device.type, dtype=_AUTOCAST[precision]):
        yield
