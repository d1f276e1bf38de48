"""The network and the tensor within what tools put around them, run as plain Python."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from timm_ext.errors import InputError

# What holds the network, by the class of the wrapper, told by name: its package need not be imported.
_HOLDERS = {
    "OptimizedModule": ("_orig_mod",),  # of torch.compile
    "DataParallel": ("module",),
    "DistributedDataParallel": ("module",),
    "AveragedModel": ("module",),
    "ActivationWrapper": ("_checkpoint_wrapped_module",),  # checkpoint_wrapper and offload_wrapper
    "_FabricModule": ("_original_module", "_forward_module"),  # the second may be a wrapper of the first
}


def bare_network(model: Any) -> nn.Module:
    """Return the network inside `torch.compile`, DataParallel, checkpoint wrappers and Lightning Fabric.

    Its parameters are the same objects; see `plain_names` for those of wrapped parts.

    Raises:
        InputError: no module, or a program of `torch.export`, or parameters spread over processes.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    if any(_is_a(module, "_StatefulGraphModule") for module in modules) or _is_a(model, "ExportedProgram"):
        raise InputError(
            "model: expected a network that can be put in eval mode (got a program of torch.export: pass the "
            "network that it was exported from, with the same weights)"
        )
    if not isinstance(model, nn.Module):
        raise InputError(f"model: expected a torch.nn.Module (got {type(model).__name__})")
    network: nn.Module = model
    while holders := _holders(network):
        network = getattr(network, holders[0])
    wrapped = any(_is_a(module, "FullyShardedDataParallel") for module in network.modules())
    if wrapped or any(hasattr(parameter, "device_mesh") for parameter in network.parameters()):
        raise InputError(
            "model: expected whole parameters in every process (got some that FSDP spreads over processes: "
            "pass the network as it was before)"
        )
    return network


def plain_names(network: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Map names of parameters to those that they have without wrappers around parts of the network.

    These are the names in checkpoints. Names that would become one are all left as they are.
    """
    plain = {name: _plain_name(network, name) for name in names}
    return plain if len(set(plain.values())) == len(plain) else {name: name for name in plain}


def _plain_name(network: nn.Module, name: str) -> str:
    kept = []
    owner: Any = network
    for part in name.split("."):
        if part not in _holders(owner):
            kept.append(part)
        owner = getattr(owner, part)
    return ".".join(kept)


def _holders(module: Any) -> tuple[str, ...]:
    """Return the attributes in which a wrapper holds the network; none for other modules."""
    names = next((names for kind, names in _HOLDERS.items() if _is_a(module, kind)), ())
    return tuple(name for name in names if isinstance(getattr(module, name, None), nn.Module))


def _is_a(module: Any, name: str) -> bool:
    return any(kind.__name__ == name for kind in type(module).__mro__)


def plain(tensor: Tensor) -> Tensor:
    """Drop a subclass, such as MONAI's `MetaTensor`, whose own functions would hide calls from the rules."""
    return tensor if type(tensor) is Tensor else tensor.as_subclass(Tensor)


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
