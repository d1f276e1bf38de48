"""The weights that training changes, and those that it leaves as they are."""

import hashlib

import torch
from torch import Tensor, nn

from timm_ext.errors import InputError, lines_of, listed


def changing_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what training changes: parameters that require gradients, and persistent buffers."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        name: value
        for name, value in model.state_dict().items()
        if name not in parameters or parameters[name].requires_grad
    }


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copy the tensors that training changes to the CPU."""
    return {name: value.detach().cpu().clone() for name, value in changing_tensors(model).items()}


@torch.no_grad()
def restore_weights(model: nn.Module, weights: dict[str, Tensor], where: object) -> None:
    """Copy weights back into a model.

    Raises:
        InputError: the model has other tensors; those that differ are listed.
    """
    check_tensors(weights, changing_tensors(model), where, "the tensors of the trained model")
    targets = model.state_dict()
    for name, value in weights.items():
        targets[name].copy_(value)


def check_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], where: object, what: str) -> None:
    """Compare names, shapes and types of tensors with those of the model.

    Raises:
        InputError: they differ; so does what is listed.
    """
    got = {name: _described(value) for name, value in found.items()}
    wanted = {name: _described(value) for name, value in expected.items()}
    if differing := sorted(name for name in got | wanted if got.get(name) != wanted.get(name)):
        listing = lines_of(
            f"{name}: {got.get(name, 'absent')}, model {wanted.get(name, 'absent')}" for name in differing
        )
        raise InputError(f"{where}: expected {what}; these differ:{listing}")


def check_finite(weights: dict[str, Tensor], model: nn.Module, where: object) -> None:
    """Refuse saved parameters that are not finite; buffers may hold anything.

    Raises:
        InputError: the parameters are listed.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if name in weights]
    if bad := [name for name in names if not bool(weights[name].isfinite().all())]:
        raise InputError(f"{where}: expected finite weights (got others in {listed(bad)})")


def frozen_digest(model: nn.Module) -> str:
    """Return the SHA-256 of all that a model computes with and `weights_of` leaves out.

    That is what its training keeps as it is: frozen parameters, and buffers outside `state_dict`, such as the
    source models of a merge.
    """
    changing = changing_tensors(model)
    digest = hashlib.sha256()
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, value in sorted(every, key=lambda pair: pair[0]):
        if name not in changing:
            digest.update(f"{name} {_described(value)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _described(tensor: Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{list(tensor.shape)}" if dtype == "float32" else f"{list(tensor.shape)} {dtype}"
