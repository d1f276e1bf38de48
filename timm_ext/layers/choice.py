"""Which layers serve a device: this package's on a CPU, unless they are switched off, else PyTorch's."""

from contextlib import AbstractContextManager, nullcontext

import torch

from timm_ext.layers.fast import fast_layers
from timm_ext.ops.memory import kept_memory


def layers_on(device: torch.device, wanted: bool) -> AbstractContextManager[None]:
    """Return `fast_layers` where the device is a CPU and they are wanted, else a context without effect."""
    return fast_layers() if _serve(device, wanted) else nullcontext()


def memory_on(device: torch.device, wanted: bool) -> AbstractContextManager[None]:
    """Return what keeps the memory of one `layers_on` for the next, where that has an effect."""
    return kept_memory() if _serve(device, wanted) else nullcontext()


def _serve(device: torch.device, wanted: bool) -> bool:
    return wanted and device.type == "cpu"
