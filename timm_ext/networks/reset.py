"""Re-initialisation of task-specific parameters."""

from collections.abc import Collection

import torch
from torch import nn

from timm_ext.errors import InputError, listed
from timm_ext.parameters import is_norm, named_parameters


@torch.no_grad()
def reset_specific(model: nn.Module, names: Collection[str], generator: torch.Generator) -> None:
    """Initialise the named parameters anew, in place, as a new network would have them.

    Weights of two or more axes are drawn by Glorot's uniform rule ("Xavier", Glorot & Bengio 2010), norms
    become weight 1 and bias 0, other biases 0, PReLU its default slope 0.25. Running statistics of the named
    norms start over.

    Args:
        model: the network.
        names: parameter names; the draws are made in registration order, whatever the order of `names`.
        generator: on the CPU; the only source of randomness.

    Raises:
        InputError: a name is not a parameter of the model, or no rule is known for it.
    """
    wanted = set(names)
    parameters = named_parameters(model)
    if unknown := sorted(wanted - parameters.keys()):
        raise InputError(f"reset: expected names of parameters (got {listed(unknown)})")
    for name, parameter in parameters.items():
        if name in wanted:
            layer, _, kind = name.rpartition(".")
            _reset(name, parameter, model.get_submodule(layer), kind, generator)


def _reset(
    name: str, parameter: nn.Parameter, owner: nn.Module, kind: str, generator: torch.Generator
) -> None:
    if is_norm(owner) and kind == "weight":
        nn.init.ones_(parameter)
        if isinstance(owner, nn.modules.batchnorm._NormBase):
            owner.reset_running_stats()
    elif kind == "bias":
        nn.init.zeros_(parameter)
    elif isinstance(owner, nn.PReLU):
        nn.init.constant_(parameter, 0.25)
    elif parameter.ndim >= 2:
        # Drawn on the CPU, so that the values do not depend on the device.
        values = torch.empty(parameter.shape, dtype=torch.float32)
        parameter.copy_(nn.init.xavier_uniform_(values, generator=generator))
    else:
        raise InputError(
            f"reset: no rule for parameter {name} {list(parameter.shape)} of {type(owner).__name__}"
        )
