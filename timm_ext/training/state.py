"""The state of an interrupted run on disk: everything that the next step depends on."""

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timm_ext.errors import InputError
from timm_ext.files import atomic_write

STATE_NAME = "state.pt"
_FORMAT = 1


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a state atomically.

    Raises:
        InputError: the folder cannot be written or the disk is full; the state before it stays.
    """
    # PyTorch's own writer reports a full disk as a RuntimeError with a C++ trace.
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, **state}, buffer)
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_state(path: Path) -> dict[str, Any]:
    """Read a state; nothing but tensors and plain values is unpickled.

    Raises:
        InputError: the file is damaged or not a training state of this version.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # A damaged archive may fail anywhere in the unpickler.
        raise InputError(f"{path}: expected the state of a training run (the file is damaged)") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise InputError(f"{path}: expected the state of a training run of format {_FORMAT}")
    return state


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copy what training changes: parameters that require gradients, and persistent buffers."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        name: value.detach().cpu().clone()
        for name, value in model.state_dict().items()
        if name not in parameters or parameters[name].requires_grad
    }


@torch.no_grad()
def restore_weights(model: nn.Module, weights: dict[str, Tensor], where: object) -> None:
    """Copy weights back into a model.

    Raises:
        InputError: the model has other tensors; all that differ are listed.
    """
    targets = model.state_dict()
    expected = {name: list(value.shape) for name, value in weights_of(model).items()}
    found = {name: list(value.shape) for name, value in weights.items()}
    if expected != found:
        names = sorted(name for name in expected | found if expected.get(name) != found.get(name))
        listing = "\n".join(
            f"  {name}: {found.get(name, 'absent')}, model {expected.get(name, 'absent')}" for name in names
        )
        raise InputError(f"{where}: expected the tensors of the trained model; these differ:\n{listing}")
    for name, value in weights.items():
        targets[name].copy_(value)
