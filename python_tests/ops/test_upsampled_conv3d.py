"""The operators around nearest-neighbour upsampling against float64, and their messages."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import conv3d, interpolate

from timm_ext.ops.upsampled_conv3d import (
    neighbour_sums3d,
    upsample_nearest3d,
    upsampled_conv3d,
    upsampled_conv3d_input_gradient,
    upsampled_conv3d_weight_grad_square_,
)


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


class Layer:
    """A convolution behind upsampling and its gradients, drawn at random, of the order of one."""

    def __init__(self, batch: int, inputs: int, outputs: int, sizes: list[int]):
        large = [2 * size for size in sizes]
        self.input, self.weight, self.bias, self.grad = tensors(
            (batch, inputs, *sizes), (outputs, inputs, 3, 3, 3), (outputs,), (batch, outputs, *large)
        )
        self.weight /= (27 * inputs) ** 0.5

    def output(self) -> Tensor:
        return self._convolve(self.input.double(), self.weight.double(), self.bias.double())

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Of the input, and of the weight example by example, squared and summed."""
        squares = torch.zeros_like(self.weight, dtype=torch.float64)
        below = []
        for x, g in zip(self.input.double().split(1), self.grad.double().split(1), strict=True):
            wanted = x.requires_grad_(), self.weight.double().requires_grad_()
            for_x, for_weight = torch.autograd.grad(self._convolve(*wanted), wanted, g)
            below.append(for_x)
            squares += for_weight.square()
        return torch.cat(below), squares

    @staticmethod
    def _convolve(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return conv3d(interpolate(input, scale_factor=2), weight, bias, padding=1)


def assert_near(result: Tensor, expected: Tensor) -> None:
    assert result.dtype == torch.float32
    assert result.shape == expected.shape
    assert (result - expected).abs().max() < 3e-6 * max(1, expected.abs().max())


def assert_layer(layer: Layer) -> None:
    assert_near(upsampled_conv3d(layer.input, layer.weight, layer.bias), layer.output())
    below, squares = layer.gradients()
    sums = neighbour_sums3d(layer.grad)
    assert_near(upsampled_conv3d_input_gradient(sums, layer.weight), below)
    before = tensors(layer.weight.shape)[0].abs()
    result = upsampled_conv3d_weight_grad_square_(before.clone(), sums, layer.input, 0.5)
    assert_near(result, before + 0.5 * squares)


@pytest.mark.parametrize("shape", [(1, 3, 4, 5, 6), (2, 5, 1, 3, 17), (1, 1, 1, 1, 1), (3, 2, 2, 2, 33)])
@pytest.mark.parametrize("strided", [False, True])
def test_upsampling_is_nearest_neighbour_interpolation(shape, strided) -> None:
    input = torch.randn(shape)
    if strided:
        input = input.to(memory_format=torch.channels_last_3d)
    assert torch.equal(upsample_nearest3d(input), interpolate(input, scale_factor=2))


@pytest.mark.parametrize(
    "shape",
    [(1, 3, 4, 5, 6), (2, 5, 1, 3, 17), (1, 1, 1, 1, 1), (3, 2, 2, 2, 33), (1, 2, 3, 2, 16), (1, 1, 2, 2, 2)],
)
@pytest.mark.parametrize("strided", [False, True])
def test_neighbours_are_summed(shape, strided) -> None:
    input = tensors(shape)[0]
    wide = torch.nn.functional.pad(input.double(), (1,) * 6)
    expected = sum(
        wide[:, :, d:, h:, w:][..., : shape[2] + 1, : shape[3] + 1, : shape[4] + 1]
        for d in (0, 1)
        for h in (0, 1)
        for w in (0, 1)
    )
    if strided:
        input = input.to(memory_format=torch.channels_last_3d)
    assert_near(neighbour_sums3d(input), expected)


@pytest.mark.parametrize(
    ("batch", "inputs", "outputs", "sizes"),
    [
        (1, 32, 16, [16, 16, 16]),
        (2, 16, 9, [6, 4, 10]),
        (1, 4, 5, [8, 8, 24]),
        (2, 3, 9, [2, 2, 2]),
        (1, 5, 7, [3, 3, 3]),
        (1, 300, 4, [2, 4, 4]),
        (3, 20, 9, [1, 2, 3]),
        (1, 1, 1, [1, 1, 1]),
        (1, 8, 8, [5, 3, 33]),
    ],
)
def test_a_convolution_behind_upsampling_and_its_gradients(batch, inputs, outputs, sizes) -> None:
    assert_layer(Layer(batch, inputs, outputs, sizes))


@settings(max_examples=30)
@given(st.data())
def test_any_size(data: st.DataObject) -> None:
    batch, inputs, outputs = (data.draw(st.integers(1, most)) for most in (2, 20, 20))
    assert_layer(Layer(batch, inputs, outputs, [data.draw(st.integers(1, most)) for most in (5, 6, 20)]))


def results(layer: Layer, *, strided: bool = False) -> list[Tensor]:
    named = layer.input, layer.weight, layer.grad
    form = torch.channels_last_3d if strided else torch.contiguous_format
    x, weight, grad = (tensor.to(memory_format=form) for tensor in named)
    sums = neighbour_sums3d(grad)
    return [
        upsampled_conv3d(x, weight, layer.bias),
        sums,
        upsampled_conv3d_input_gradient(sums, weight),
        upsampled_conv3d_weight_grad_square_(torch.zeros(layer.weight.shape), sums, x),
    ]


@pytest.mark.parametrize("sizes", [[6, 5, 17], [4, 2, 2]])
def test_the_bits_do_not_depend_on_threads_or_strides(sizes) -> None:
    layer = Layer(2, 12, 20, sizes)
    expected = results(layer)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5, 16):
            torch.set_num_threads(count)
            assert all(map(torch.equal, results(layer), expected))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, results(layer, strided=True), expected))


def test_what_is_not_finite_stays_near() -> None:
    layer = Layer(1, 2, 3, [6, 6, 18])
    clean = upsampled_conv3d(layer.input, layer.weight)
    layer.input[0, 0, 3, 3, 8] = float("nan")
    result = upsampled_conv3d(layer.input, layer.weight)
    assert result[0, :, 5:9, 5:9, 15:19].isnan().all()
    far = torch.ones(12, 12, 36, dtype=torch.bool)
    far[5:9, 5:9, 15:19] = False
    assert torch.equal(result[0, :, far], clean[0, :, far])


def test_nothing_stays_nothing() -> None:
    assert upsample_nearest3d(torch.zeros(0, 3, 4, 5, 6)).shape == (0, 3, 8, 10, 12)
    assert upsample_nearest3d(torch.zeros(1, 3, 4, 0, 6)).shape == (1, 3, 8, 0, 12)
    assert neighbour_sums3d(torch.zeros(0, 3, 4, 5, 6)).shape == (0, 3, 5, 6, 7)
    layer = Layer(0, 3, 4, [2, 2, 2])
    assert upsampled_conv3d(layer.input, layer.weight).shape == (0, 4, 4, 4, 4)
    sums = neighbour_sums3d(layer.grad)
    assert upsampled_conv3d_input_gradient(sums, layer.weight).shape == (0, 3, 2, 2, 2)
    accumulator = torch.ones(layer.weight.shape)
    assert upsampled_conv3d_weight_grad_square_(accumulator, sums, layer.input).eq(1).all()


VOLUME = torch.zeros(1, 2, 3, 4, 5)
SUMS = torch.zeros(1, 4, 5, 5, 7)
WEIGHT = torch.zeros(4, 2, 3, 3, 3)


@pytest.mark.parametrize("operator", [upsample_nearest3d, neighbour_sums3d])
@pytest.mark.parametrize(
    ("input", "message"),
    [
        (VOLUME.double(), r"input must be float32 \(got float64\)"),
        (VOLUME[0], r"input must have 5 axes \(got \[2, 3, 4, 5\]\)"),
    ],
)
def test_volumes_that_do_not_fit_are_refused(operator, input, message) -> None:
    with pytest.raises(RuntimeError, match=rf"^\w+: {message}"):
        operator(input)


@pytest.mark.parametrize(
    ("operator", "call", "message"),
    [
        (neighbour_sums3d, [VOLUME[:, :, :0]], r"input must have voxels \(got \[1, 2, 0, 4, 5\]\)"),
        (upsampled_conv3d, [VOLUME.double(), WEIGHT], r"input must be float32 \(got float64\)"),
        (
            upsampled_conv3d,
            [VOLUME, WEIGHT[:, :1]],
            r"weight must be \[O, 2, 3, 3, 3\] for input .*got \[4, 1,",
        ),
        (upsampled_conv3d, [VOLUME, WEIGHT[..., :1]], r"weight must be \[O, 2, 3, 3, 3\]"),
        (upsampled_conv3d, [VOLUME, WEIGHT, torch.zeros(3)], r"bias must be \[4\], contiguous \(got \[3\]\)"),
        (
            upsampled_conv3d_input_gradient,
            [SUMS[:, :3], WEIGHT],
            r"weight must be \[3, I, 3, 3, 3\] for sums",
        ),
        (
            upsampled_conv3d_input_gradient,
            [SUMS[..., 1:], WEIGHT],
            r"sums must have odd sizes \(got \[1, 4, 5, 5, 6",
        ),
        (
            upsampled_conv3d_weight_grad_square_,
            [WEIGHT, SUMS, VOLUME],
            r"acc, sums and input must be .*got \[4, 2, 3, 3, 3\], \[1, 4, 5, 5, 7\] and \[1, 2, 3, 4, 5\]",
        ),
        (upsampled_conv3d_weight_grad_square_, [WEIGHT, SUMS[..., 1:], VOLUME], r"sums must have odd sizes"),
        (
            upsampled_conv3d_weight_grad_square_,
            [WEIGHT.double(), SUMS, torch.zeros(1, 2, 2, 2, 3)],
            r"acc must be float32 \(got float64\)",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(operator, call, message) -> None:
    with pytest.raises(RuntimeError, match=rf"^\w+: {message}"):
        operator(*call)


def test_an_accumulator_inside_the_input_is_refused() -> None:
    memory = torch.zeros(27 + 8)
    accumulator, input = memory[:27].view(1, 1, 3, 3, 3), memory[20:28].view(1, 1, 2, 2, 2)
    with pytest.raises(RuntimeError, match="acc must not share memory"):
        upsampled_conv3d_weight_grad_square_(accumulator, torch.zeros(1, 1, 5, 5, 5), input)
