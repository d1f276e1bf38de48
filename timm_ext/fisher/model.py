"""What a model must be for its Fisher to be defined: its parameters examined, its mode set and restored."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from timm_ext.errors import InputError
from timm_ext.parameters import named_parameters, parameter_aliases


@dataclass(frozen=True)
class Tracked:
    """Parameters whose Fisher is wanted.

    Attributes:
        parameters: by first name, in registration order.
        names: first name by the `id` of each.
        frozen: names left out since they need no gradient.
    """

    parameters: dict[str, nn.Parameter]
    names: dict[int, str]
    frozen: tuple[str, ...]


def examine_model(model: nn.Module, *, strict: bool) -> Tracked:
    """List the parameters of a model, and refuse one whose Fisher would not be what it seems.

    Args:
        model: any module.
        strict: refuse frozen and tied parameters, too; otherwise frozen ones are left out, and a tied one is
            one parameter whose gradient is the sum over its places.

    Raises:
        InputError: naming all parameters concerned.
    """
    every = named_parameters(model)
    if odd := [f"{name} {p.dtype}" for name, p in every.items() if not p.is_floating_point()]:
        raise InputError(f"model: expected floating-point parameters (got {', '.join(odd)})")
    _refuse_batch_statistics(model)
    _refuse_tied(model, strict)
    frozen = tuple(name for name, parameter in every.items() if not parameter.requires_grad)
    if strict and frozen:
        raise InputError(
            f"model: expected parameters that require gradients (got frozen {', '.join(frozen)}; "
            "strict=False leaves them out)"
        )
    wanted = {name: parameter for name, parameter in every.items() if parameter.requires_grad}
    if not wanted:
        raise InputError("model: expected parameters that require gradients (got none)")
    return Tracked(wanted, {id(parameter): name for name, parameter in wanted.items()}, frozen)


@contextmanager
def no_randomness(device: torch.device) -> Iterator[None]:
    """Refuse a forward that draws random numbers: two passes would not see the same network.

    Raises:
        InputError: PyTorch's global generator was used.
    """
    before = _generator_states(device)
    yield
    if any(not torch.equal(a, b) for a, b in zip(before, _generator_states(device), strict=True)):
        raise InputError(
            "model: expected a deterministic forward in eval mode (got one that draws random numbers, "
            "such as dropout that ignores the mode)"
        )


def _generator_states(device: torch.device) -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _refuse_batch_statistics(model: nn.Module) -> None:
    bad = [
        f"{path}.weight" if module.affine else path
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None
    ]
    if bad:
        raise InputError(
            f"batch norm {', '.join(bad)}: expected running statistics (got statistics of the batch, in "
            "which one example changes another's gradient)"
        )


def _refuse_tied(model: nn.Module, strict: bool) -> None:
    """Refuse a parameter owned by two modules; one module registered under two names is no tie."""
    aliases = parameter_aliases(model)
    places = {name: _place(model, name) for name in aliases}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = [
        f"{name} = {first}"
        for name, first in aliases.items()
        if places[name] != places[first] and (strict or parameters[name] is not parameters[first])
    ]
    if tied:
        raise InputError(
            f"model: expected parameters of one place each (got tied {', '.join(tied)}"
            + (
                "; strict=False counts a tied parameter once)"
                if strict
                else " as two objects that share memory)"
            )
        )


def _place(model: nn.Module, name: str) -> tuple[int, str]:
    path, _, attribute = name.rpartition(".")
    return id(model.get_submodule(path)), attribute
