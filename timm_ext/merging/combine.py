"""Trained networks of one architecture and task as one predictor: the mean of their weights or logits."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from timm_ext.layout import check_compatible
from timm_ext.merging.buffers import Buffers, set_buffers
from timm_ext.parameters import named_parameters, parameter_aliases


class LogitEnsemble(nn.Module):
    """The mean over T networks of their logits, z(x) = Σ_t z_t(x) / T; a prediction costs T times as much.

    Args:
        networks: from `[B, C, D, H, W]` to logits `[B, R, D, H, W]`, at least one.

    Attributes:
        size_divisor: what every edge of an image must be divisible by, as for the networks.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.size_divisor = int(getattr(networks[0], "size_divisor", 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return the mean logits `[B, R, D, H, W]`."""
        return torch.stack([network(images) for network in self.networks]).mean(dim=0)


def uniform_soup(networks: Sequence[nn.Module]) -> nn.Module:
    """Return a network with the mean of the networks' weights, θ* = Σ_t θ_t / T, heads and norms included.

    Buffers are those of a merge with equal ratios, see `timm_ext.merging.buffers.Buffers`.

    Source: Wortsman et al., Model soups, ICML 2022, section 2.

    Args:
        networks: of one architecture, at least one; they are not changed.

    Raises:
        InputError: the networks differ in their tensors, or in buffers that have no mean; all are listed.
    """
    states = {f"network {number}": network.state_dict() for number, network in enumerate(networks, 1)}
    check_compatible(states)
    soup = copy.deepcopy(networks[0])
    own = soup.state_dict()
    buffers = Buffers.collect(states, [name for name in own if name not in parameter_aliases(soup)])
    equal = torch.full((1, len(networks)), 1 / len(networks), dtype=torch.float64)
    set_buffers(soup, buffers.merged(dict.fromkeys(buffers.values, equal)))
    with torch.no_grad():
        for name, parameter in named_parameters(soup).items():
            values = torch.stack([state[name].to(parameter.device) for state in states.values()])
            parameter.copy_(values.double().mean(dim=0))
    return soup
