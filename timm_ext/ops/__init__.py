"""The operators: for each a documented function, its fake kernel, and its twin in `reference`."""

from typing import Any

_HERE_BEFORE = {
    "MIXINGS": "merge",
    "conv_weight_grad_square_": "fisher",
    "fused_merge": "merge",
    "ratios": "merge",
    "sample_labels": "fisher",
    "square_accumulate_": "fisher",
}


def __getattr__(name: str) -> Any:
    if name not in _HERE_BEFORE:
        raise AttributeError(f"module 'timm_ext.ops' has no attribute {name!r}")
    import warnings
    from importlib import import_module

    place = f"timm_ext.ops.{_HERE_BEFORE[name]}"
    warnings.warn(f"timm_ext.ops.{name} has moved to {place}", DeprecationWarning, stacklevel=2)
    return getattr(import_module(place), name)
