"""Networks of `monai.networks.nets` by the names of their classes; no other name is looked up."""

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

PREFIX = "monai."
UNKNOWN_DIVISOR = 32  # the coarsest grid of MONAI's networks is 1/32 of the input

Divisor = Callable[[Mapping[str, Any]], int]


def _stride_product(options: Mapping[str, Any]) -> int:
    return math.prod(max(s) if isinstance(s, (list, tuple)) else s for s in options["strides"])


def _halvings(options: Mapping[str, Any]) -> int:
    return 1 << (len(options["blocks_down"]) - 1)


_UNET = {"spatial_dims": 3, "channels": [16, 32, 64, 128, 256], "strides": [2, 2, 2, 2], "num_res_units": 2}
_DYNUNET = {
    "spatial_dims": 3,
    "kernel_size": [3, 3, 3, 3, 3],
    "strides": [1, 2, 2, 2, 2],
    "upsample_kernel_size": [2, 2, 2, 2],
}
OPTIONS: dict[str, tuple[dict[str, Any], Divisor]] = {
    "UNet": (_UNET, _stride_product),
    "AttentionUnet": ({k: v for k, v in _UNET.items() if k != "num_res_units"}, _stride_product),
    "DynUNet": (_DYNUNET, _stride_product),
    "SegResNet": ({"blocks_down": [1, 2, 2, 4]}, _halvings),
    "SegResNetDS": ({"blocks_down": [1, 2, 2, 4]}, _halvings),
    "BasicUNet": ({}, lambda options: 16),
}
"""Options that are set unless the caller sets them, and the divisor of images, by class."""

SUPERVISED = {
    "DynUNet": re.compile(r"(?:^|\.)deep_supervision_heads\.(\d+)\."),
    "SegResNetDS": re.compile(r"(?:^|\.)up_layers\.(\d+)\.head\.weight$"),
}
"""Classes with heads on coarser grids whose maps they return in training alone, and how tensors tell them."""


def network_class(short: str) -> type[nn.Module] | None:
    """Return a class of `monai.networks.nets` that is a module, None where there is none of the name."""
    from monai.networks import nets

    found = getattr(nets, short, None)
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


def parameters_of(kind: type[nn.Module]) -> tuple[str, ...] | None:
    """Return the names of what a class is built from; None for one that takes any."""
    parameters = inspect.signature(kind).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return tuple(parameter.name for parameter in parameters)


def prepare(model: nn.Module) -> nn.Module:
    """Let DynUNet drop the maps of its coarser heads after each forward, so that it can be copied."""
    if isinstance(getattr(model, "heads", None), list) and getattr(model, "deep_supervision", False):
        model.register_forward_hook(_drop_maps)
    return model


def _drop_maps(model: nn.Module, images: object, outputs: object) -> None:
    heads: Any = model.heads
    heads[:] = [torch.zeros(1)] * len(heads)  # the list that all its layers share


def own_defaults(short: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options, with MONAI's own defaults before those of `OPTIONS`, for files of other programs."""
    kind = network_class(short)
    defaults = {} if kind is None else inspect.signature(kind).parameters
    ours = OPTIONS[short][0] if short in OPTIONS else {}
    own = {name: defaults[name].default for name in ours if name in defaults}
    given = {name: value for name, value in own.items() if value is not inspect.Parameter.empty}
    plain = {name: list(v) if isinstance(v, tuple) else v for name, v in given.items()}
    return {**ours, **plain, **options}


def as_stored(short: str, options: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the options with the heads on coarser grids that the tensors of a file are of.

    Args:
        short: name of the class.
        options: as a config or a user says them.
        names: of the tensors, wrappers' names in front of them or not.
    """
    if short not in SUPERVISED:
        return dict(options)
    heads = {int(found[1]) for name in names if (found := SUPERVISED[short].search(name))}
    if short == "SegResNetDS":
        return {**options, "dsdepth": max(len(heads), 1)}
    if not heads:
        return {**options, "deep_supervision": False}
    return {**options, "deep_supervision": True, "deep_supr_num": len(heads)}
