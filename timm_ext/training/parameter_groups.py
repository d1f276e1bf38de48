"""Groups of parameters with rates and beginnings of their own."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from timm_ext.errors import InputError


def named_groups(
    model: nn.Module, groups: Sequence[Mapping[str, Any]] | None, lr: float
) -> list[dict[str, Any]]:
    """Complete the parameter groups and check that they are disjoint parts of the model.

    Args:
        model: that is trained.
        groups: see `timm_ext.training.trainer.Trainer.fit`; None is one group of everything.
        lr: of groups that name none.

    Raises:
        InputError: as said, or a group is empty.
    """
    complete = [
        {"name": str(index), "lr": lr, "start": 0, **group, "params": list(group["params"])}
        for index, group in enumerate(groups or [{"params": model.parameters()}])
    ]
    chosen = [parameter for group in complete for parameter in group["params"]]
    if not chosen or any(not group["params"] for group in complete):
        raise InputError("training: expected at least one parameter in every parameter group")
    if len(set(chosen)) < len(chosen) or not set(chosen) <= set(model.parameters()):
        raise InputError("training: parameter groups must be disjoint parts of the model that is trained")
    return complete


def rate_columns(groups: list[dict[str, Any]]) -> tuple[str, ...]:
    """Return the names of the groups' rates in logs."""
    return ("lr",) if len(groups) == 1 else tuple(f"lr_{group['name']}" for group in groups)


def hold_back(optimizer: Optimizer, step: int) -> None:
    """Take away the gradients of groups that start after this step: the optimiser leaves them alone."""
    for group in optimizer.param_groups:
        if group.get("start", 0) > step:
            for parameter in group["params"]:
                parameter.grad = None
