"""A network without memory: names and shapes of its tensors, before any of them is made."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timm_ext.errors import InputError
from timm_ext.networks.registry import build_network
from timm_ext.storage.metadata import NetworkConfig


class TooLargeError(InputError):
    """A network grew beyond what was asked for while it was built."""


def outline_network(config: NetworkConfig, *, most_bytes: int, most_tensors: int) -> nn.Module:
    """Build a network on the `meta` device, or with memory where its constructor needs values.

    Args:
        config: of the network.
        most_bytes: that may pass through its constructor, every result of an operation counted.
        most_tensors: that may, likewise.

    Raises:
        TooLargeError: more passed through; at most one tensor was made beyond.
        InputError: no such network, or options it does not take.
    """
    try:
        with torch.device("meta"), _Bounds(most_bytes, most_tensors):
            return _build(config)
    except TooLargeError:
        raise
    except InputError:
        # Constructors that look at values of tensors do not run without memory.
        with _Bounds(most_bytes, most_tensors):
            return _build(config)


def _build(config: NetworkConfig) -> nn.Module:
    return build_network(
        config.name,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        seed=0,
        **config.options,
    )


class _Bounds(TorchDispatchMode):
    """Counts what operations return, and stops at a bound."""

    def __init__(self, most_bytes: int, most_tensors: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._bytes, self._tensors = most_bytes, most_tensors

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._tensors -= 1
                self._bytes -= value.numel() * value.element_size()
        if self._bytes < 0 or self._tensors < 0:
            raise TooLargeError("network: expected one of the size of its file (got a much larger one)")
        return result
