"""Memory of large results on the CPU that is kept for the next ones."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.library import register_fake

from timm_ext.ops.operands import check_tensors, integers
from timm_ext.ops.shapes import empty

_ops = torch.ops.timm_ext


@contextmanager
def kept_memory() -> Iterator[None]:
    """Keep the memory of this package's large CPU results for the next ones, until the context ends.

    A pass of a network frees what the next one takes again. malloc would give it back to the system, which
    clears it anew, or leave holes that it cannot use: glibc does not find one of just the size it is asked
    for. Behind the context the system takes the memory when it needs some (`MADV_FREE`; until then it counts
    as the process's); what is left serves the next context. Contexts may be nested; results may outlive them.
    Needs Linux and PyTorch 2.11; without effect elsewhere.
    """
    _ops.keep_memory.default(True)
    try:
        yield
    finally:
        _ops.keep_memory.default(False)


def release_memory() -> None:
    """Give memory that contexts of `kept_memory` have left and no result is in back to the system."""
    _ops.release_memory.default()


def kept_bytes() -> int:
    """Return how much memory contexts of `kept_memory` and their results have from the system."""
    return int(_ops.kept_bytes.default())


def new_tensor(like: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return an uninitialised tensor of another's type and device, from kept memory where it is large."""
    check_tensors(like=like)
    tensor: Tensor = _ops.new_tensor.default(like, integers("sizes", sizes))
    return tensor


register_fake("timm_ext::new_tensor", empty)
