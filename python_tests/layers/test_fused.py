"""Which convolutions take the fused kernel, and that the Fisher is the same either way."""

import pytest
import torch
from torch import nn

from timm_ext.fisher import FisherAccumulator
from timm_ext.fisher.precision import precise
from timm_ext.layers import fused


def columns(inputs: int) -> int:
    return inputs * 27


@pytest.mark.parametrize(
    ("outputs", "inputs", "edge", "half", "expected"),
    [
        (16, 16, 128, False, True),  # few outputs, whatever the volume
        (32, 32, 128, False, True),
        (64, 64, 32, False, False),
        (64, 64, 8, False, True),  # launches dominate
        (256, 256, 8, False, False),
        (256, 256, 2, False, True),
        (16, 16, 128, True, False),  # tensor cores
        (16, 16, 16, True, True),
    ],
)
def test_few_outputs_and_small_products_are_fused(outputs, inputs, edge, half, expected) -> None:
    assert fused.prefers_fused(1, outputs, columns(inputs), edge**3, half=half) == expected


def test_groups_count_in_the_products() -> None:
    assert fused.prefers_fused(1, 64, columns(1), 64**3)
    assert not fused.prefers_fused(64, 64, columns(1), 64**3)


def serves(device: str, dtype: torch.dtype, sums: torch.dtype = torch.float32) -> bool:
    acc = torch.empty(16, 16, 3, 3, 3, device=device, dtype=sums)
    grad, input = (torch.empty(1, 16, 8, 8, 8, device=device, dtype=dtype) for _ in range(2))
    return fused.serves(acc, grad, input, 1)


def test_what_the_operator_takes() -> None:
    assert serves("cpu", torch.float32)
    assert not serves("cpu", torch.bfloat16)
    assert not serves("cpu", torch.float64, torch.float64)
    assert not serves("meta", torch.float32)


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_tf32_goes_by_cudnn(device: torch.device) -> None:
    for precision, expected in [("ieee", True), ("tf32", False)]:
        with precise(precision, device):
            assert serves("cuda", torch.float32) == expected
            assert serves("cuda", torch.bfloat16)
            assert not serves("cuda", torch.float64, torch.float64)


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv3d(2, 8, 3, padding=1),
        nn.LeakyReLU(),
        nn.Conv3d(8, 40, 3, stride=2, padding=1, groups=2),
        nn.LeakyReLU(),
        nn.ConvTranspose3d(40, 8, 3, stride=2, padding=1, output_padding=1),
        nn.LeakyReLU(),
        nn.Conv3d(8, 2, 1),
    )


def fisher(model: nn.Module, x: torch.Tensor, **options: str) -> dict[str, torch.Tensor]:
    labels = (x > 0).to(x.dtype)
    with FisherAccumulator(model, labels="true", **options) as accumulator:
        accumulator.update(x, labels, [str(i) for i in range(len(x))])
    return accumulator.result().tensors


@pytest.mark.parametrize(("precision", "relative"), [("ieee", 2e-5), ("bf16-mixed", 0.05)])
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_the_fisher_is_the_same_either_way(
    device: torch.device, precision: str, relative: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = network().to(device), torch.randn(3, 2, 12, 14, 16).to(device)
    found = []
    for fuse in (True, False):
        monkeypatch.setattr(fused, "prefers_fused", lambda *sizes, half, fuse=fuse: fuse)
        found.append(fisher(model, x, precision=precision))
    for name, tensor in found[0].items():
        error = (tensor - found[1][name]).abs().max() / found[1][name].abs().max()
        assert error < relative, name
