"""How a rule makes a node of a call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from timm_ext.layers.half import half_path
from timm_ext.layers.tape import Call

Rule = Callable[..., Tensor | None]


def record(
    node: Any, call: Call, input: Tensor, weight: Tensor | None, bias: Tensor | None, *options: Any
) -> Tensor:
    """Make a node of the graph."""
    output: Tensor = node.apply(input, call.anchor, *call.entering(weight, bias), *options, call)
    return output


def like(input: Tensor, parameter: Tensor | None) -> Tensor | None:
    """Cast a parameter to the input's type under autocast."""
    if parameter is None or not torch.is_autocast_enabled(input.device.type):
        return parameter
    return parameter.detach().to(input.dtype)


def beside(input: Tensor, parameter: Tensor | None) -> Tensor | None:
    """Do the same for convolutions, which on the CPU take float32 parameters beside bfloat16 volumes."""
    stays = parameter is not None and parameter.dtype == torch.float32 and input.device.type == "cpu"
    return parameter if stays and input.dtype in (torch.bfloat16, torch.float32) else like(input, parameter)


def autocast(input: Tensor) -> Tensor:
    """Cast as autocast does for convolutions and products; the rules run outside of its reach.

    On a CPU that is faster in float32 than in bfloat16 to float32.
    """
    device = input.device.type
    if not torch.is_autocast_enabled(device) or not input.is_floating_point() or input.dtype == torch.float64:
        return input
    dtype = torch.get_autocast_dtype(device)
    single = device == "cpu" and dtype == torch.bfloat16 and half_path()[0] == "float32"
    return input.to(torch.float32 if single else dtype)
