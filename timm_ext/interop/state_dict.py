"""Networks as plain PyTorch files: tensors by the names of the network's own program."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timm_ext.errors import InputError
from timm_ext.files import atomic_write


def write_state_dict(
    path: Path, model: nn.Module | Mapping[str, Tensor], key: str | None = "state_dict", **beside: Any
) -> None:
    """Write `{key: …}`, every alias of a tensor included, and other values beside it; or the tensors alone.

    Args:
        path: of the file.
        model: a network, or its tensors by name.
        key: under which they lie; None for no record around them.
        **beside: the other values.

    Raises:
        InputError: the file cannot be written.
    """
    with atomic_write(path) as temporary:
        try:
            tensors = model.state_dict() if isinstance(model, nn.Module) else model
            torch.save(dict(tensors) if key is None else {key: dict(tensors), **beside}, temporary)
        except RuntimeError as error:  # of a full disk
            raise InputError(f"{path}: cannot be written ({error})") from error
