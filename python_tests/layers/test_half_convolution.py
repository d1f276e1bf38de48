"""bfloat16 convolutions on the CPU against float64."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import timm_ext
from timm_ext.layers import half, half_convolution
from timm_ext.layers.convolution import Geometry
from timm_ext.layers.rules import recording

UNIT = 2.0**-8  # of bfloat16
# Input, weights and result are rounded; Winograd's forms make 5/3 of that.
BOUND = 3 * UNIT
GRIDS = [(n,) * 3 for n in range(1, 9)] + [(1, 2, 3), (4, 1, 2), (3, 8, 1), (2, 5, 8), (8, 3, 4), (1, 1, 8)]
CHANNELS = [(8, 8), (16, 24), (64, 8), (8, 64)]


@pytest.fixture(autouse=True)
def stored_in_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """Volumes in bfloat16, also where the CPU is no faster for it."""
    for module in (half_convolution, recording):
        monkeypatch.setattr(module, "half_path", lambda: ("avx512_bf16", ""))


def error(found: Tensor, expected: Tensor) -> float:
    assert found.isfinite().all()
    return float((found.double() - expected).norm() / expected.norm())


def gradients(x: Tensor, weight: Tensor, grad: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = x.requires_grad_(), weight.requires_grad_()
    output = functional.conv3d(x, weight, stride=stride, padding=weight.shape[2] // 2)
    below, for_weight = torch.autograd.grad(output, (x, weight), grad)
    return output.detach(), below, for_weight


@pytest.mark.parametrize(("kernel", "stride"), itertools.product((1, 3), (1, 2)))
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_small_grid_is_right(grid: tuple[int, ...], kernel: int, stride: int) -> None:
    """oneDNN's own weight gradient is NaN or garbage on some of them."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).bfloat16().double()

    for inputs, outputs in CHANNELS:
        x, weight = drawn(2, inputs, *grid), drawn(outputs, inputs, *[kernel] * 3)
        grad = drawn(2, outputs, *[(size - 1) // stride + 1 for size in grid])
        expected = gradients(x, weight, grad, stride)
        with timm_ext.fast_layers(), torch.autocast("cpu", torch.bfloat16):
            found = gradients(x.detach().float(), weight.detach().float(), grad.bfloat16(), stride)
        assert found[0].dtype == torch.bfloat16
        assert found[2].dtype == torch.float32
        for one, other in zip(found, expected, strict=True):
            assert error(one, other) < BOUND


class Layers(nn.Module):
    """A convolution of each kind, norms and activations."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(2, 16, 3, padding=1)
        self.norm = nn.InstanceNorm3d(16, affine=True)
        self.down = nn.Conv3d(16, 24, 3, stride=2, padding=1)
        self.grouped = nn.Conv3d(24, 24, 3, padding=1, groups=3)
        self.behind = nn.Conv3d(24, 16, 3, padding=1)
        self.up = nn.ConvTranspose3d(16, 8, 2, stride=2)
        self.head = nn.Conv3d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.leaky_relu(self.norm(self.first(x)), 0.01, inplace=True)
        x = functional.interpolate(self.grouped(self.down(x)), scale_factor=2, mode="nearest")
        logits: Tensor = self.head(self.up(self.behind(x)))
        return logits


def step(precise: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model, x = Layers(), torch.randn(2, 2, 9, 10, 18)
    if precise:
        model, x = model.double(), x.double()
    with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
        loss = model(x).double().square().mean()
    loss.backward()
    return {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def fast_step() -> dict[str, Tensor]:
    with timm_ext.fast_layers():
        return step()


def test_gradients_of_float32_weights_are_float32_and_right() -> None:
    """Beside those of PyTorch's bfloat16, of whose noise Winograd's forms make 5/3."""
    found, plain, expected = fast_step(), step(), step(precise=True)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        if name != "first.bias":  # in front of a norm: exactly 0
            assert error(gradient, expected[name]) < max(2 * error(plain[name], expected[name]), BOUND)


@pytest.mark.parametrize("threads", [2, 4])
def test_bits_do_not_depend_on_threads_or_runs(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = fast_step()
        torch.set_num_threads(threads)
        found = fast_step()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_without_fast_bfloat16_it_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "the CPU has neither"
    monkeypatch.setattr(recording, "half_path", lambda: ("float32", reason))
    with timm_ext.fast_layers():
        found = step()
    torch.manual_seed(0)
    model, x = Layers(), torch.randn(2, 2, 9, 10, 18)
    with timm_ext.fast_layers():
        model(x).double().square().mean().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], parameter.grad)


def test_amx_is_given_no_small_grids_and_few_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_convolution, "half_path", lambda: ("amx", ""))

    def takes(size: int, channels: int, padding: int = 1) -> bool:
        geometry = Geometry((1,) * 3, (padding,) * 3, (1,) * 3, False, (0,) * 3, 1)
        return half_convolution.takes_tiles(
            geometry, torch.zeros(1, channels, size, size, size), torch.zeros(channels, channels, 3, 3, 3)
        )

    assert takes(8, 16)
    assert not takes(7, 16)
    assert not takes(8, 15)
    assert takes(10, 16, padding=0)
    assert not takes(9, 16, padding=0)  # an output of 7


@pytest.mark.parametrize(("kernel", "stride"), itertools.product((1, 3), (1, 2)))
@pytest.mark.parametrize("grid", [(n,) * 3 for n in range(1, 9)] + [(8, 9, 11), (16, 15, 18)], ids=str)
def test_amx_way_is_right(
    monkeypatch: pytest.MonkeyPatch, grid: tuple[int, ...], kernel: int, stride: int
) -> None:
    """By oneDNN where the grid is large enough, which takes what the CPU has."""
    if half.half_path()[0] == "float32":
        pytest.skip("needs a CPU with bfloat16")
    monkeypatch.setattr(half_convolution, "half_path", lambda: ("amx", ""))
    generator = torch.Generator().manual_seed(0)

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).bfloat16()

    x, weight = drawn(2, 16, *grid), drawn(24, 16, *[kernel] * 3)
    grad = drawn(2, 24, *[(size - 1) // stride + 1 for size in grid])
    expected = gradients(x.double(), weight.double(), grad.double(), stride)
    with timm_ext.fast_layers(), torch.autocast("cpu", torch.bfloat16):
        found = gradients(x.detach().float(), weight.detach().float(), grad, stride)
    for one, other in zip(found, expected, strict=True):
        assert error(one, other) < BOUND


def test_the_default_type_plays_no_part() -> None:
    expected = fast_step()
    torch.manual_seed(0)
    model, x = Layers(), torch.randn(2, 2, 9, 10, 18)
    torch.set_default_dtype(torch.float64)
    try:
        with timm_ext.fast_layers():
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(x).double().square().mean()
            loss.backward()
    finally:
        torch.set_default_dtype(torch.float32)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


@pytest.mark.parametrize("sizes", [(2, 3, 1, 2, 5), (1, 16, 4, 3, 8)], ids=str)
def test_upsampling_copies_every_bit(sizes: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**15), 2**15, sizes, generator=generator, dtype=torch.int16)
    volume = bits.view(torch.bfloat16)
    for x in (volume, volume.transpose(2, 4)):
        with timm_ext.fast_layers(), torch.autocast("cpu", torch.bfloat16):
            found = functional.interpolate(x, scale_factor=2, mode="nearest")
        expected = x.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)
        assert torch.equal(found.view(torch.int16), expected.contiguous().view(torch.int16))


@pytest.mark.parametrize("slope", [0.0, 0.1])
def test_a_norm_takes_in_the_activation_behind_it(slope: float) -> None:
    torch.manual_seed(0)
    norm, x = nn.InstanceNorm3d(6, affine=True), torch.randn(2, 6, 5, 6, 7).bfloat16().requires_grad_()
    grad = torch.randn(2, 6, 5, 6, 7).bfloat16()
    with timm_ext.fast_layers(), torch.autocast("cpu", torch.bfloat16):
        output = functional.leaky_relu(norm(x), slope, inplace=True)
        found = torch.autograd.grad(output, [x, *norm.parameters()], grad)
    assert output.dtype == torch.bfloat16
    assert output.grad_fn is not None
    assert "GroupNormNode" in output.grad_fn.name()
    wide = x.detach().double().requires_grad_()
    precise = functional.leaky_relu(norm.double()(wide), slope)
    expected = torch.autograd.grad(precise, [wide, *norm.parameters()], grad.double())
    for one, other in zip([output.detach(), *found], [precise.detach(), *expected], strict=True):
        assert error(one, other) < UNIT
