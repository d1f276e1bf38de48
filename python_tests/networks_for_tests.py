"""Small networks with moved channels, for the tests of tracing and alignment."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from timm_ext.networks import build_network
from timm_ext.networks.channels import ChannelMap
from timm_ext.parameters import named_parameters

NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "isensee2017": lambda seed: build_network(
        "isensee2017", in_channels=2, out_channels=3, seed=seed, base_filters=4, levels=3
    ),
    "UNet": lambda seed: build_network(
        "monai.UNet", in_channels=2, out_channels=3, seed=seed, channels=[4, 8, 8], strides=[2, 2]
    ),
    "UNet, batch norm": lambda seed: build_network(
        "monai.UNet",
        in_channels=2,
        out_channels=3,
        seed=seed,
        channels=[4, 8],
        strides=[2],
        norm="BATCH",
        num_res_units=0,
    ),
    "BasicUNet": lambda seed: build_network(
        "monai.BasicUNet", in_channels=2, out_channels=3, seed=seed, features=[4, 4, 8, 8, 8, 4]
    ),
    "SegResNet": lambda seed: build_network(
        "monai.SegResNet", in_channels=2, out_channels=3, seed=seed, init_filters=16, blocks_down=[1, 1],
        blocks_up=[1],
    ),
    "DynUNet": lambda seed: build_network(  # registers its layers under several names
        "monai.DynUNet", in_channels=2, out_channels=3, seed=seed, kernel_size=[3, 3, 3], strides=[1, 2, 2],
        upsample_kernel_size=[2, 2], filters=[4, 8, 8],
    ),
    "AttentionUnet": lambda seed: build_network(
        "monai.AttentionUnet", in_channels=2, out_channels=3, seed=seed, channels=[4, 8], strides=[2]
    ),
}  # fmt: skip


def jittered(name: str, seed: int = 0) -> nn.Module:
    """A network of the list whose norms and slopes have left their symmetric start, as after training."""
    model = NETWORKS[name](seed)
    generator = torch.Generator().manual_seed(seed)
    tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    with torch.no_grad():
        for tensor in tensors:
            tensor += 0.1 * torch.rand(tensor.shape, generator=generator)
    return model.eval()


def images(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """Two volumes of noise, on whose coarsest grid a norm sees more than a few voxels."""
    edge = 2 * model.size_divisor
    shape = (2, 2, 2 * edge, edge, edge)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def random_permutations(channels: ChannelMap, seed: int = 0) -> dict[str, Tensor]:
    """Whole blocks of each group at random places, and their channels at random places within."""
    generator = torch.Generator().manual_seed(seed)
    permutations = {}
    for group in channels.groups.values():
        count, size = group.blocks.shape
        rows = group.blocks[torch.randperm(count, generator=generator)]
        rows = torch.stack([row[torch.randperm(size, generator=generator)] for row in rows])
        permutation = torch.empty(group.size, dtype=torch.int64)
        permutation[group.blocks.flatten()] = rows.flatten()
        permutations[group.name] = permutation
    return permutations


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**{n: p.detach() for n, p in named_parameters(model).items()}, **dict(model.named_buffers())}


def permuted_copy(model: nn.Module, channels: ChannelMap, permutations: dict[str, Tensor]) -> nn.Module:
    """The network with its channels at other places."""
    twin = copy.deepcopy(model)
    for name, tensor in channels.permute(tensors_of(model), permutations).items():
        tensors_of(twin)[name].copy_(tensor)
    return twin


class NormsAndHeads(nn.Module):
    """Encoder with norms, a transposed convolution, two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 4, 3)
        self.norm = nn.InstanceNorm3d(4, affine=True)
        self.up = nn.ConvTranspose3d(4, 6, 2, groups=2, bias=False)
        self.group_norm = nn.GroupNorm(2, 6)
        self.head1 = nn.Conv3d(6, 3, 1)
        self.head2 = nn.Conv3d(6, 3, 1)


def assert_same(model: nn.Module, other: nn.Module) -> None:
    """Two networks hold the same tensors under the same names."""
    assert model.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in model.state_dict().items())
