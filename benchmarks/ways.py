"""Ways to run a network on the CPU by PyTorch: plain, as others speed it up, and with our own layers."""

import copy
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import timm_ext


@dataclass(frozen=True)
class Way:
    """How a network is run; the defaults are plain PyTorch, contiguous, in float32.

    Attributes:
        title: in tables.
        layers: under `timm_ext.fast_layers`.
        channels_last: network and images in `channels_last_3d`.
        compiled: by `torch.compile`.
        precision: bfloat16 is autocast's.
    """

    title: str
    layers: bool = False
    channels_last: bool = False
    compiled: bool = False
    precision: torch.dtype = torch.float32

    def ready(self, model: nn.Module, images: Tensor) -> tuple[nn.Module, Tensor]:
        """Return a copy of the network, and the images, as this way wants them."""
        model = copy.deepcopy(model)
        if self.channels_last:
            model = model.to(memory_format=torch.channels_last_3d)
            images = images.to(memory_format=torch.channels_last_3d)
        if self.compiled:
            torch._dynamo.reset()  # what is compiled is compiled for a number of threads
            model = torch.compile(model, dynamic=False)
        return model, images

    def surroundings(self) -> AbstractContextManager[None]:
        """Return what a forward pass and its backward pass run in."""
        return timm_ext.fast_layers() if self.layers else nullcontext()

    def autocast(self) -> AbstractContextManager[object]:
        """Return what a forward pass alone runs in, inside of the surroundings."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == torch.bfloat16)


WAYS: dict[str, Way] = {
    "plain": Way("PyTorch"),
    "channels_last": Way("`channels_last_3d`", channels_last=True),
    "compile": Way("`torch.compile`", compiled=True),
    "bfloat16": Way("PyTorch, bfloat16", precision=torch.bfloat16),
    "ours": Way("timm_ext", layers=True),
    "ours bfloat16": Way("timm_ext, bfloat16", layers=True, precision=torch.bfloat16),
}


def standard(names: Iterable[str], path: str) -> list[str]:
    """Return the ways of a committed result: no `torch.compile`, and bfloat16 where the CPU is fast in it.

    Args:
        names: of ways, or of programs and trainers named alike.
        path: which `timm_ext.layers.half.half_path` tells.
    """
    return [name for name in names if name != "compile" and (path != "float32" or "bfloat16" not in name)]
