"""Small layers and networks for the tests of `fast_layers`, and what is compared of them."""

import copy
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional

import timm_ext

MOST = 1e-5  # of the norm of float64's gradient; PyTorch's float32 is off by 1e-7 to 4e-6 here
CONVOLUTION, NORM, UPSAMPLED = (
    f"{name}NodeBackward" for name in ("Convolution", "GroupNorm", "UpsampledConvolution")
)


def batch(channels: int = 2, edge: int = 8, dtype: torch.dtype = torch.float32, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, channels, edge, edge, edge, generator=generator).to(dtype)


def smooth(model: nn.Module) -> nn.Module:
    """Make kinks small, at which rounding decides between two derivatives."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, (nn.ReLU, nn.LeakyReLU, nn.PReLU)):
                setattr(parent, name, nn.LeakyReLU(0.9, inplace=getattr(child, "inplace", False)))
    return model


def far_from_kinks(model: nn.Module, edge: int) -> Tensor:
    """The batch of some for which the least value in front of a kink is the largest."""
    model, least = copy.deepcopy(model).double(), []
    for module in model.modules():
        if isinstance(module, nn.LeakyReLU):
            module.register_forward_pre_hook(lambda _, args: least.append(float(args[0].abs().min())))

    def margin(seed: int) -> float:
        least.clear()
        with torch.no_grad():
            model(batch(edge=edge, seed=seed).double())
        return min(least, default=1.0)

    return batch(edge=edge, seed=max(range(8), key=margin))


def loss(output: Tensor) -> Tensor:
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(4))
    return (output - target.to(output.dtype)).square().mean()


def gradients(model: nn.Module, x: Tensor, *, fast: bool) -> dict[str, Tensor]:
    model.zero_grad()
    with timm_ext.fast_layers() if fast else nullcontext():
        output = model(x)
        loss(output).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest error of a tensor relative to its norm, or to a hundredth of all: small sums cancel."""
    whole = torch.cat([value.flatten() for value in expected.values()]).norm()
    return max(
        float((found[name] - value).norm() / max(value.norm(), whole / 100))
        for name, value in expected.items()
    )


def names(tensor: Tensor) -> list[str]:
    """Of the nodes behind a tensor."""
    waiting, seen = [tensor.grad_fn], {}
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen[node] = node.name()
            waiting.extend(below for below, _ in node.next_functions)
    return list(seen.values())


class Layers(nn.Module):
    """Each kind of layer: padding in words, a stride, upsampling, transposed, pointwise, both norms."""

    def __init__(self, inplace: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv3d(2, 6, 3, padding="same")
        self.norm = nn.InstanceNorm3d(6, affine=True)
        self.down = nn.Conv3d(6, 8, 3, stride=2, padding=1, bias=False)
        self.groups = nn.GroupNorm(8, 8)
        self.up = nn.Conv3d(8, 6, 3, padding=1)
        self.transposed = nn.ConvTranspose3d(6, 5, 2, stride=2)
        self.head = nn.Conv3d(5, 1, 1)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        z = functional.leaky_relu(self.norm(self.first(x)), 0.9, inplace=self.inplace)
        z = functional.leaky_relu(self.groups(self.down(z)), 0.9, inplace=self.inplace)
        z = self.up(functional.interpolate(z, scale_factor=2))
        return self.head(self.transposed(z))


def layers(dtype: torch.dtype = torch.float32, **options: bool) -> Layers:
    torch.manual_seed(1)
    return Layers(**options).to(dtype)


def expected_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return gradients(copy.deepcopy(model).double(), x.double(), fast=False)
