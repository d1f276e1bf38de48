"""Norms of bfloat16 with their channels last and their backward against float64, their bits, the messages."""

import pytest
import torch
from torch import Tensor

from timm_ext.ops import reference
from timm_ext.ops.channels_last_norm import (
    channels_last_norm,
    channels_last_norm_backward,
    channels_last_sums,
)

SIZES = [(2, 6, 9 * 7 * 5), (1, 16, 40_000), (3, 1, 70), (2, 48, 1000), (2, 7, 5), (1, 100, 333), (1, 3, 1)]
HALF = 2.0**-8  # of a value, by which rounding to bfloat16 may change it


def drawn(batch: int, channels: int, points: int, mean: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(points)
    return (mean + 3 * torch.randn(batch, points, channels, generator=generator)).bfloat16()


def affine(channels: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(channels)
    return torch.randn(channels, generator=generator), torch.randn(channels, generator=generator)


def wide(volume: Tensor) -> Tensor:
    return volume.double().transpose(1, 2)


@pytest.mark.parametrize("mean", [0.0, 200.0])
@pytest.mark.parametrize("sizes", SIZES)
def test_it_normalises(sizes: tuple[int, int, int], mean: float) -> None:
    input, (weight, bias) = drawn(*sizes, mean=mean), affine(sizes[1])
    for groups in {1, sizes[1]}:
        output, *moments = channels_last_norm(input, weight, bias, groups=groups)
        right, *wanted = reference.group_norm(wide(input), weight.double(), bias.double(), groups=groups)
        torch.testing.assert_close(wide(output), right, rtol=HALF, atol=1e-5)
        for moment, exact in zip(moments, wanted, strict=True):
            torch.testing.assert_close(moment.double(), exact, rtol=1e-5, atol=1e-6)


def test_without_weight_and_bias() -> None:
    input = drawn(2, 6, 500)
    plain, unit = channels_last_norm(input, groups=6), torch.ones(6)
    assert all(map(torch.equal, plain, channels_last_norm(input, unit, 0 * unit, groups=6)))


@pytest.mark.parametrize("slope", [1.0, 0.01, 0.0])
@pytest.mark.parametrize("sizes", SIZES)
def test_the_backward_is_the_gradient(sizes: tuple[int, int, int], slope: float) -> None:
    grad, input, (weight, bias) = drawn(*sizes).flip(0), drawn(*sizes, mean=1.0), affine(sizes[1])
    for groups in {1, sizes[1]}:
        _, *moments = channels_last_norm(input, weight, bias, groups=groups)
        got = channels_last_norm_backward(grad, input, *moments, weight, bias, slope=slope)
        exact = [moment.double() for moment in moments], [vector.double() for vector in (weight, bias)]
        steep = torch.tensor([slope], dtype=torch.float64)
        right = reference.norm_backward(wide(grad), wide(input), *exact[0], *exact[1], steep)
        scale = float(grad.abs().max()) * float((exact[0][1] + 1e-5).rsqrt().max())
        torch.testing.assert_close(wide(got[0]), right[0], rtol=HALF, atol=1e-4 * scale)
        for rows, wanted in zip(got[1:], right[1:3], strict=True):
            torch.testing.assert_close(rows.double(), wanted, rtol=1e-4, atol=1e-4 * sizes[2] ** 0.5)


@pytest.mark.parametrize("sizes", SIZES[:4])
def test_the_bits_do_not_depend_on_threads(sizes: tuple[int, int, int]) -> None:
    grad, input = drawn(*sizes), drawn(*sizes, mean=1.0)

    def results() -> list[Tensor]:
        output, *moments = channels_last_norm(input, groups=1)
        sums = channels_last_sums(input)
        return [sums, output, *moments, *channels_last_norm_backward(grad, input, *moments, slope=0.1)]

    torch.set_num_threads(1)
    once = results()
    for threads in (2, 4):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, once, results()))


@pytest.mark.parametrize("sizes", SIZES)
def test_sums_are_those_of_float64(sizes: tuple[int, int, int]) -> None:
    input = drawn(*sizes, mean=1.0)
    exact = input.double().sum(1)
    bound = 1e-6 * input.double().abs().sum(1)
    assert ((channels_last_sums(input).double() - exact).abs() <= bound).all()


def test_what_is_no_number_stays_in_its_channel() -> None:
    input = drawn(1, 3, 200)
    input[0, 7, 1] = torch.nan
    output, *_ = channels_last_norm(input, groups=3)
    assert output[..., 1].isnan().all()
    assert output[..., [0, 2]].isfinite().all()


@pytest.mark.parametrize("sizes", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_an_empty_input_has_empty_results(sizes: tuple[int, int, int]) -> None:
    input = torch.empty(sizes, dtype=torch.bfloat16)
    output, mean, variance = channels_last_norm(input, groups=1)
    below, *rows = channels_last_norm_backward(input, input, mean, variance)
    assert output.shape == below.shape == input.shape
    assert all(row.shape == (sizes[0], sizes[2]) and not row.any() for row in rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(2, 5, 3)}, "input must be bfloat16"),
        (
            {"input": torch.zeros(2, 3, 5, dtype=torch.bfloat16).mT},
            "input must be .B, points, C.",
        ),
        ({"groups": 2}, "groups must divide the channels of input, 3"),
        ({"weight": torch.zeros(2)}, "weight must hold 3 elements"),
        ({"bias": torch.zeros(3, dtype=torch.float64)}, "bias must be float32"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    call = {"input": torch.zeros(2, 5, 3, dtype=torch.bfloat16), "groups": 3} | change
    with pytest.raises(RuntimeError, match=message):
        channels_last_norm(**call)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.zeros(2, 4, 3, dtype=torch.bfloat16)}, "grad must have the shape of input"),
        ({"mean": torch.zeros(5)}, "mean must hold a number for each group"),
        ({"variance": torch.zeros(4)}, "variance must hold 6 elements"),
    ],
)
def test_gradients_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    volume = torch.zeros(2, 5, 3, dtype=torch.bfloat16)
    call = {"grad": volume, "input": volume, "mean": torch.zeros(6), "variance": torch.zeros(6)} | change
    with pytest.raises(RuntimeError, match=message):
        channels_last_norm_backward(**call)
