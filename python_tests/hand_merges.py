"""Two source models small enough to merge by hand, and a target network."""

import torch
from torch import Tensor, nn

from timm_ext.layout import Layout
from timm_ext.merging import Bank


class FisherStub:
    def __init__(self, *values: list[float]):
        self.tensors = {f"body.{n}": torch.tensor(v) for n, v in zip(("weight", "bias"), values, strict=True)}
        self.zero, self.scaling = (), "sum"


def weights(*values: list[float]) -> dict[str, Tensor]:
    return {f"body.{n}": torch.tensor(v) for n, v in zip(("weight", "bias"), values, strict=True)}


def network() -> nn.Module:
    """One weight and one bias to share, whose values are 9, and a head."""
    net = nn.Sequential()
    net.add_module("body", nn.Linear(1, 1))
    net.add_module("head", nn.Linear(1, 1))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(9)
    return net


def bank() -> Bank:
    """M1 = (2, 10), M2 = (6, 30) with Fishers (3, 1) and (1, 1): computed by hand below."""
    models = {"M1": weights([[2.0]], [10.0]), "M2": weights([[6.0]], [30.0])}
    fishers = [FisherStub([[3.0]], [1.0]), FisherStub([[1.0]], [1.0])]
    return Bank.build(models, fishers, Layout.from_tensors(models["M1"]))


def values(model: nn.Module) -> list[float]:
    return [p.item() for p in model.parameters()]
