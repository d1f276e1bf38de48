"""What a model must be for its Fisher to be defined: its parameters examined, its mode set and restored."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from timm_ext.errors import InputError, listed
from timm_ext.fisher.unwrap import plain_names
from timm_ext.parameters import named_parameters, parameter_aliases


@dataclass(frozen=True)
class Tracked:
    """Parameters whose Fisher is wanted.

    Attributes:
        parameters: by first name without wrappers (`plain_names`), in registration order.
        names: first name by the `id` of each.
        frozen: names left out since they need no gradient.
    """

    parameters: dict[str, nn.Parameter]
    names: dict[int, str]
    frozen: tuple[str, ...]


def examine_model(model: nn.Module, *, strict: bool) -> Tracked:
    """List the parameters of a model, and refuse one whose Fisher would not be what it seems.

    `strict` refuses frozen and tied parameters, too; otherwise frozen ones are left out, and a tied one is
    one parameter whose gradient is the sum over its places.

    Raises:
        InputError: naming all parameters concerned.
    """
    registered = named_parameters(model)
    plain = plain_names(model, registered)
    every = {plain[name]: parameter for name, parameter in registered.items()}
    _refuse_odd(every)
    _refuse_batch_statistics(model)
    _refuse_tied(model, strict)
    frozen = tuple(name for name, parameter in every.items() if not parameter.requires_grad)
    if len(frozen) == len(every):
        raise InputError(
            "model: expected parameters that require gradients (got none: a frozen network, or one from "
            "torch.jit.freeze, whose weights are constants)"
        )
    if strict and frozen:
        raise InputError(
            f"model: expected parameters that require gradients (got frozen {listed(frozen)}; "
            "strict=False leaves them out)"
        )
    wanted = {name: parameter for name, parameter in every.items() if parameter.requires_grad}
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


def _refuse_odd(parameters: Mapping[str, nn.Parameter]) -> None:
    for what, odd in _ODD.items():
        if found := [f"{name} {kind}" for name, parameter in parameters.items() if (kind := odd(parameter))]:
            raise InputError(f"model: expected {what} (got {listed(found)})")


_ODD: dict[str, Callable[[Tensor], str]] = {
    "floating-point parameters": lambda p: "" if p.is_floating_point() else str(p.dtype),
    "parameters with values": lambda p: "on meta" if p.is_meta else "",
    "ordinary parameters": lambda p: "made in torch.inference_mode" if p.is_inference() else "",
}


def _refuse_batch_statistics(model: nn.Module) -> None:
    bad = [
        f"{path}.weight" if getattr(module, "weight", None) is not None else path
        for path, module in model.named_modules()
        if _is_batch_norm(module) and getattr(module, "running_mean", None) is None
    ]
    if bad:
        raise InputError(
            f"batch norm {listed(bad)}: expected running statistics (got statistics of the batch, in "
            "which one example changes another's gradient)"
        )


def _is_batch_norm(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    script_of = getattr(module, "original_name", "")  # the class of what TorchScript was made from
    return isinstance(script_of, str) and "BatchNorm" in script_of


def _refuse_tied(model: nn.Module, strict: bool) -> None:
    """Refuse a parameter owned by two modules; one module registered under two names is no tie."""
    aliases = parameter_aliases(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    places = {name: (id(modules[name.rpartition(".")[0]]), name.rpartition(".")[2]) for name in aliases}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = [
        f"{name} = {first}"
        for name, first in aliases.items()
        if places[name] != places[first] and (strict or parameters[name] is not parameters[first])
    ]
    if tied:
        raise InputError(
            f"model: expected parameters of one place each (got tied {listed(tied)}"
            + (
                "; strict=False counts a tied parameter once)"
                if strict
                else " as two objects that share memory)"
            )
        )
