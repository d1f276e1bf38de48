"""A small network, banks of it, and the definition of their merge."""

import torch
from torch import Tensor, nn

from timm_ext.groups import make_groups
from timm_ext.layout import Layout
from timm_ext.merging.bank import Bank
from timm_ext.merging.merged_model import MergedModel
from timm_ext.parameters import named_parameters, split_parameters


class Net(nn.Module):
    """Two convolutions, one of them transposed, with batch and instance norm, a buffer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(2, 4, 3, padding=1)
        self.batch_norm = nn.BatchNorm3d(4)
        self.up = nn.ConvTranspose3d(4, 4, 2, stride=2)
        self.norm = nn.InstanceNorm3d(4, affine=True)
        self.head = nn.Conv3d(4, 3, 1)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        x = torch.relu(self.batch_norm(self.first(x)))
        return self.head(torch.relu(self.norm(self.up(x)))) * scale


class FisherStub:
    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors, self.zero, self.scaling = tensors, (), "sum"


def network(seed: int) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net()


def bank_of(count: int = 2, *, fisher: bool = True, names: tuple[str, ...] | None = None) -> Bank:
    nets = [network(seed) for seed in range(count)]
    names = names or split_parameters(nets[0], heads=["head."]).shared
    models = {
        f"M{t + 1}": {n: p.detach() for n, p in named_parameters(net).items()} for t, net in enumerate(nets)
    }
    fishers = [FisherStub({n: p.detach() ** 2 + 0.01 for n, p in m.items()}) for m in models.values()]
    return Bank.build(models, fishers if fisher else None, Layout.from_model(nets[0], names))


def image() -> Tensor:
    return torch.randn(2, 2, 4, 4, 4, generator=torch.Generator().manual_seed(5))


def plain_merge(model: MergedModel, bank: Bank, logits: Tensor) -> Tensor:
    """The definition in float64, element by element."""
    groups = make_groups(bank.layout, model.granularity)
    rows = groups.rows.repeat_interleave(groups.offsets.diff())
    alpha = {"sigmoid": torch.sigmoid, "softmax": torch.exp, "free": torch.clone}[model.mixing](
        logits.double()
    )
    weight = alpha[rows].T * (1 if bank.fisher is None else bank.fisher.double())
    if model.mixing == "free":
        return (weight * bank.theta.double()).sum(0)
    return (weight * bank.theta.double()).sum(0) / weight.sum(0)
