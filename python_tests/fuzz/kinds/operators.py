"""The operators against their definitions in float64, for random shapes, strides, types and numbers."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from fuzz import Outcome, kind
from fuzz.tensors import ERROR, assert_near, clear, drawn, sizes_of, view
from torch import Tensor
from torch.nn import functional

import timm_ext
from timm_ext.ops import conv3d, norm, reference
from timm_ext.ops import depthwise_conv3d as depthwise
from timm_ext.ops import merge as ops
from timm_ext.ops import upsampled_conv3d as upsampled
from timm_ext.ops.memory import kept_memory

# --- the merge ------------------------------------------------------------------------------------------


def matrices(rng: random.Random, values: Tensor) -> Tensor:
    """Rows further apart, and not aligned."""
    models, elements = values.shape
    before, behind = rng.choice([0, 0, 1, 7]), rng.choice([0, 0, 1, 24])
    wide = torch.full((models, before + elements + behind), torch.nan, dtype=values.dtype)
    wide[:, before : before + elements] = values
    return wide[:, before : before + elements]


def fishers(rng: random.Random, models: int, elements: int, dtype: torch.dtype) -> Tensor | None:
    how = rng.randrange(4)
    if how == 0:
        return None
    values = drawn(rng, models, elements, dtype=torch.float64).abs() + 1e-3
    if how == 2 and dtype in (torch.float32, torch.bfloat16):
        values = 10 ** (drawn(rng, models, elements, dtype=torch.float64).clamp(-3, 3) * 12)
    if how == 3:
        values *= drawn(rng, models, elements) > 0
    return values.to(dtype)


@kind("operators-merge")
def merge(rng: random.Random, folder: Path) -> Outcome:
    """fused_merge, its gradients and its tangent."""
    dtype = rng.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
    models = rng.choice([1, 2, 3, 5, 9])
    longest = rng.choice([1, 5, 40, 3000])
    lengths = [rng.randint(1, longest) for _ in range(rng.randint(0, 8))]
    elements = sum(lengths)
    rows = rng.randint(1, 4) if rng.random() < 0.5 else len(lengths)
    groups = torch.tensor([rng.randrange(rows) for _ in lengths], dtype=torch.int64) if rows else None
    if rows == len(lengths) and rng.random() < 0.5:
        groups = None
    mixing = rng.choice(ops.MIXINGS)
    logits = drawn(rng, rows, models, dtype=torch.float64) * rng.choice([1, 1, 30])
    if mixing == "ratios":
        logits = logits.abs() + 0.1
    theta = matrices(rng, drawn(rng, models, elements, dtype=dtype))
    fisher = fishers(rng, models, elements, dtype)
    fisher = None if fisher is None else matrices(rng, fisher)
    logits = view(rng, logits.to(torch.float64 if dtype == torch.float64 else torch.float32))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    _check_merge(rng, (theta, fisher, logits, offsets), {"mixing": mixing, "groups": groups})
    return Outcome.RIGHT


def _check_merge(rng: random.Random, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    theta, fisher, logits, offsets = arguments
    eps = torch.finfo(theta.dtype).eps
    leaves = [None if value is None else value.requires_grad_() for value in (theta, fisher, logits)]
    wide = [None if v is None else v.detach().double().clone().requires_grad_() for v in leaves]
    merged = clear(lambda: timm_ext.fused_merge(*leaves, offsets, **options))
    expected = reference.fused_merge(*wide, offsets, **options)
    largest = wide[0].detach().abs().amax(0) if theta.numel() else 0.0
    unit = 2.0**-24 if eps > 1e-10 else 2.0**-53  # log-weights are rounded to it
    rounded = 8 * unit * (1 + float(logits.detach().abs().amax() if logits.numel() else 0))
    assert_near(merged.detach(), expected.detach(), largest, max(2 * eps, rounded))
    gradient = view(rng, drawn(rng, theta.shape[1], dtype=theta.dtype))
    wanted = [place for place in (0, 2) if leaves[place] is not None]
    got = torch.autograd.grad(merged, [leaves[p] for p in wanted], gradient)
    right = torch.autograd.grad(expected, [wide[p] for p in wanted], gradient.double())
    bound = (gradient.double().abs() * (largest + 1)).sum() if theta.numel() else 0.0
    for one, other in zip(got, right, strict=True):
        assert_near(one, other, bound, max(2 * eps, 10 * rounded))


@kind("operators-squares")
def squares(rng: random.Random, folder: Path) -> Outcome:
    """square_accumulate_ and the squares of a convolution's weight gradients."""
    if rng.random() < 0.3:
        dtype = rng.choice([torch.float32, torch.float64, torch.bfloat16, torch.float16])
        shapes = [sizes_of(rng, rng.randint(0, 4), 9) for _ in range(rng.randint(1, 4))]
        acc = [
            torch.ones(s, dtype=torch.float64 if dtype == torch.float64 else torch.float32) for s in shapes
        ]
        grads = [view(rng, drawn(rng, *s, dtype=dtype)) for s in shapes * rng.randint(1, 3)]
        scale = rng.choice([1.0, 0.25, 1e-3])
        wide = [a.double() for a in acc]
        reference.square_accumulate_(wide, [g.double() for g in grads], scale)
        clear(lambda: timm_ext.square_accumulate_(acc, grads, scale))
        for one, other in zip(acc, wide, strict=True):
            assert_near(one, other, other, 1e-6)
        return Outcome.RIGHT
    axes, groups, batch = rng.randint(1, 3), rng.choice([1, 1, 2, 3]), rng.randint(0, 3)
    outputs, inputs = groups * rng.randint(1, 9), groups * rng.randint(1, 9)
    stride, dilation = ([rng.randint(1, 3) for _ in range(axes)] for _ in range(2))
    padding = [rng.randint(0, 3) for _ in range(axes)]
    kernel, sizes = sizes_of(rng, axes, 3), sizes_of(rng, axes, 11)
    room = zip(sizes, padding, kernel, dilation, stride, strict=True)
    points = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, k, d, s in room]
    if min(points) < 1:
        points = [max(p, 1) for p in points]
    acc = torch.rand(outputs, inputs // groups, *kernel)
    grad, input = drawn(rng, batch, outputs, *points), drawn(rng, batch, inputs, *sizes)
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    result = acc.clone()
    clear(lambda: timm_ext.conv_weight_grad_square_(result, view(rng, grad), view(rng, input), **geometry))
    wide = acc.double()
    if batch:
        reference.conv_weight_grad_square_(wide, grad.double(), input.double(), **geometry)
    assert_near(result, wide, wide.amax())
    if axes == 3:
        sum_of = clear(
            lambda: conv3d.conv3d_weight_gradient(view(rng, grad), view(rng, input), kernel, **geometry)
        )
        wide = [grad.double(), input.double()]
        expected = reference.conv3d_weight_gradient(*wide, kernel, **geometry)
        most = reference.conv3d_weight_gradient(*(v.abs() for v in wide), kernel, **geometry)
        assert_near(sum_of, expected, most.amax())
    return Outcome.RIGHT


# --- single layers --------------------------------------------------------------------------------------


@kind("operators-convolutions")
def convolutions(rng: random.Random, folder: Path) -> Outcome:
    """Every convolution of volumes."""
    with kept_memory():
        rng.choice([_small, _winograd, _back_through_a_stride, _upsampled, _depthwise])(rng)
    return Outcome.RIGHT


def _small(rng: random.Random) -> None:
    stride, dilation = ([rng.randint(1, 3) for _ in range(3)] for _ in range(2))
    geometry = {"stride": stride, "padding": [rng.randint(0, 3) for _ in range(3)], "dilation": dilation}
    _convolve(rng, "small_conv3d", sizes_of(rng, 3, 3), 9, **geometry, mirrored=rng.random() < 0.3)


def _winograd(rng: random.Random) -> None:
    rows = rng.choice([3, 5])
    kernel = [rng.choice([1, rows]), rows, rng.choice([1, 2, 3, 3, 5])]
    padding = [rng.randint(0, 3) for _ in range(3)]
    _convolve(rng, "winograd_conv3d", kernel, 20, padding=padding, mirrored=rng.random() < 0.3)


def _convolve(rng: random.Random, name: str, kernel: Sequence[int], most: int, **options: Any) -> None:
    input, weight, bias = _operands(rng, kernel, most)
    if options["mirrored"]:
        weight = weight.transpose(0, 1)
    _check(rng, getattr(conv3d, name), getattr(reference, name), (input, weight), bias, **options)


def _back_through_a_stride(rng: random.Random) -> None:
    size = sizes_of(rng, 3, 17)
    grad = drawn(rng, rng.randint(0, 2), rng.randint(1, 20), *((n + 1) // 2 for n in size))
    weight = drawn(rng, grad.shape[1], rng.randint(1, 20), 3, 3, 3)
    ours, twin = conv3d.strided_conv3d_input_gradient, reference.strided_conv3d_input_gradient
    _check(rng, ours, twin, (grad, weight), size)


def _upsampled(rng: random.Random) -> None:
    input, weight, bias = _operands(rng, [3, 3, 3], 9)
    large = upsampled.upsample_nearest3d(view(rng, input))
    assert torch.equal(large, reference.upsample_nearest3d(input))
    _check(rng, upsampled.upsampled_conv3d, reference.upsampled_conv3d, (input, weight), bias)
    if not input.numel():
        return
    grad = drawn(rng, len(input), len(weight), *large.shape[2:])
    sums = clear(lambda: upsampled.neighbour_sums3d(view(rng, grad)))
    ours, twin = upsampled.upsampled_conv3d_input_gradient, reference.upsampled_conv3d_input_gradient
    _check(rng, ours, twin, (sums, weight))
    acc = torch.zeros_like(weight)
    square = upsampled.upsampled_conv3d_weight_grad_square_
    clear(lambda: square(acc, view(rng, sums), view(rng, input)))
    wide = torch.zeros_like(weight, dtype=torch.float64)
    geometry = {"stride": [1] * 3, "padding": [1] * 3, "dilation": [1] * 3}
    reference.conv_weight_grad_square_(wide, grad.double(), large.double(), **geometry)
    assert_near(acc, wide, wide.amax(), 2 * ERROR)


def _depthwise(rng: random.Random) -> None:
    """Forward, back to the input, and to the weight."""
    stride, dilation = ([rng.randint(1, 3) for _ in range(3)] for _ in range(2))
    around = {"stride": stride, "padding": [rng.randint(0, 4) for _ in range(3)], "dilation": dilation}
    channels, kernel = rng.choice([0, 1, 3, 5]), [rng.randint(1, 9) for _ in range(3)]
    least = [d * (k - 1) + 1 - 2 * p for d, k, p in zip(dilation, kernel, around["padding"], strict=True)]
    sizes = [max(n, least_size) for n, least_size in zip(sizes_of(rng, 3, 40), least, strict=True)]
    input, weight = drawn(rng, rng.randint(0, 2), channels, *sizes), drawn(rng, channels, 1, *kernel)
    bias = drawn(rng, channels) if rng.random() < 0.5 else None
    output = clear(lambda: depthwise.depthwise_conv3d(view(rng, input), view(rng, weight), bias, **around))
    if not output.numel():
        return
    _check(rng, depthwise.depthwise_conv3d, reference.depthwise_conv3d, (input, weight), bias, **around)
    grad = drawn(rng, *output.shape)
    ours, twin = depthwise.depthwise_conv_transpose3d, reference.depthwise_conv_transpose3d
    _check(rng, ours, twin, (grad, weight), bias, **around, size=sizes)


def _operands(rng: random.Random, kernel: Sequence[int], most: int) -> tuple[Tensor, Tensor, Tensor | None]:
    inputs, outputs = rng.choice([0, 1, 3, 8, 20]), rng.choice([1, 3, 8, 17])
    input = drawn(rng, rng.choice([0, 1, 1, 2, 3]), inputs, *sizes_of(rng, 3, most))
    bias = drawn(rng, outputs) if rng.random() < 0.5 else None
    return input, drawn(rng, outputs, inputs, *kernel), bias


def _check(
    rng: random.Random,
    function: Callable[..., Tensor],
    twin: Callable[..., Tensor],
    factors: tuple[Tensor, Tensor],
    last: Any = None,
    **options: Any,
) -> None:
    """Hold a product of two tensors, shifted by a bias or of a size, to that of its twin."""
    more = () if last is None else (last,)
    got = clear(lambda: function(*(view(rng, factor) for factor in factors), *more, **options))
    if factors[0].shape[1] == 0:
        bias = torch.zeros(got.shape[1]) if last is None else last
        assert torch.equal(got, bias.view(1, -1, 1, 1, 1).expand_as(got))
        return
    wide = [value.double() if isinstance(value, Tensor) else value for value in (*factors, *more)]
    terms = [value.abs() if isinstance(value, Tensor) else value for value in wide]
    expected, most = twin(*wide, **options), twin(*terms, **options)
    assert_near(got, expected, most.amax() + 1 if got.numel() else 0.0)


@kind("operators-norms-and-labels")
def norms_and_labels(rng: random.Random, folder: Path) -> Outcome:
    """Instance norms with their gradients, sampled labels, log-weights."""
    rng.choice([_norm, _labels, _ratios])(rng)
    return Outcome.RIGHT


def _norm(rng: random.Random) -> None:
    batch, channels = rng.randint(0, 3), rng.randint(1, 5)
    input = drawn(rng, batch, channels, *sizes_of(rng, rng.randint(1, 3), 13)) * 3 + rng.choice([0, 5])
    weight, bias = (drawn(rng, channels) if rng.random() < 0.7 else None for _ in range(2))
    slope, epsilon = rng.choice([None, torch.zeros(1), torch.rand(channels)]), rng.choice([1e-5, 1e-2])
    groups = rng.choice([n for n in range(1, channels + 1) if channels % n == 0] + [0])
    over = "groups" if groups else "batch"

    def normalise(module: Any, x: Tensor, *affine: Tensor | None) -> Any:
        if groups:
            return module.group_norm(x, *affine, groups=groups, epsilon=epsilon)
        return module.batch_norm(x, *affine, epsilon=epsilon)

    output, mean, variance = clear(lambda: normalise(norm, view(rng, input), weight, bias))
    grad = drawn(rng, *input.shape)
    options = {"epsilon": epsilon, "over": over, "slope_wanted": rng.random() < 0.5}
    parameters = mean, variance, weight, bias, slope
    got = clear(lambda: norm.norm_backward(view(rng, grad), view(rng, input), *parameters, **options))
    if not input.numel():
        return
    wide = [None if v is None else v.double() for v in (input, weight, bias)]
    normal, *moments = normalise(reference, *wide)
    scale = (moments[1] + epsilon).rsqrt()
    assert_near(output, normal, 100.0)
    if bool((normal.abs() < 1e-3).any()) and slope is not None:
        return  # float32 may lie on the other side of the kink
    steep_wide = None if slope is None else slope.double()
    right = reference.norm_backward(grad.double(), wide[0], *moments, *wide[1:], steep_wide, **options)
    steep = float(scale.max()) * (1.0 if weight is None else float(weight.abs().max())) + 1
    for one, other in zip(got, right, strict=True):
        assert_near(one, other, 30 * (float(grad.abs().sum()) + 1) * steep)


def _labels(rng: random.Random) -> None:
    dtype = rng.choice([torch.float32, torch.float64])
    logits = drawn(
        rng, rng.randint(0, 3), rng.randint(1, 5), *sizes_of(rng, rng.randint(0, 3), 9), dtype=dtype
    )
    keys = torch.tensor([rng.getrandbits(63) for _ in range(len(logits))], dtype=torch.int64)
    likelihood = rng.choice(["bernoulli", "categorical"])
    labels, scores = clear(lambda: timm_ext.sample_labels(view(rng, logits), keys, likelihood))
    if not logits.numel():
        return
    share = logits.double().sigmoid() if likelihood == "bernoulli" else logits.double().softmax(1)
    hot = labels if likelihood == "bernoulli" else functional.one_hot(labels, logits.shape[1]).movedim(-1, 1)
    assert_near(scores, hot.double() - share, 1.0, 1e-6)
    expected, _ = reference.sample_labels(logits.double(), keys, likelihood)
    assert float((labels != expected).double().mean()) <= 2 / labels.numel()


def _ratios(rng: random.Random) -> None:
    mixing = rng.choice(ops.MIXINGS)
    logits = drawn(rng, rng.randint(0, 5), rng.randint(1, 6)) * rng.choice([1, 20])
    logits = logits.abs() if mixing == "ratios" else logits
    got = clear(lambda: timm_ext.ratios(view(rng, logits), mixing))
    wide = logits.double()
    share = {"sigmoid": wide.sigmoid(), "softmax": wide.exp(), "ratios": wide}[mixing]
    assert_near(got, share / share.sum(1, keepdim=True), 1.0, 1e-6)
