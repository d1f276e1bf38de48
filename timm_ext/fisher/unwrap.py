"""The network within what tools put around it, run as plain Python."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from timm_ext.errors import InputError


def bare_network(model: Any) -> nn.Module:
    """Return the network inside `torch.compile`, DataParallel, DistributedDataParallel and Lightning Fabric.

    Its parameters are the same objects, under the names that its checkpoints have.

    Raises:
        InputError: no module, or one whose parameters are spread over processes.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model: expected a torch.nn.Module (got {type(model).__name__})")
    network: nn.Module = model
    while (inner := _inside(network)) is not None:
        network = inner
    wrapped = any(_is_a(module, "FullyShardedDataParallel") for module in network.modules())
    if wrapped or any(hasattr(parameter, "device_mesh") for parameter in network.parameters()):
        raise InputError(
            "model: expected whole parameters in every process (got some that FSDP spreads over processes: "
            "pass the network as it was before)"
        )
    return network


def _inside(model: nn.Module) -> nn.Module | None:
    wraps = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    inner: Any = None
    if wraps or _is_a(model, "_FabricModule"):
        inner = model.module
    elif _is_a(model, "OptimizedModule"):  # of torch.compile
        inner = model._orig_mod
    return inner if isinstance(inner, nn.Module) else None


def _is_a(module: nn.Module, name: str) -> bool:
    """Tell a class by its name, so that its package need not be imported."""
    return any(kind.__name__ == name for kind in type(module).__mro__)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run all that `torch.compile` compiled, whole networks or parts, as the Python that it was made from.

    Compiled code calls none of the functions that the rules know.
    """
    if "torch._dynamo" not in sys.modules:  # costs a second to import, and nothing was compiled without it
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
