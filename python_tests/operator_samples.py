"""Every operator of the library with its function in Python, its twin in `reference`, and calls of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor

import timm_ext
from timm_ext.ops import channels_last_norm as channels_last
from timm_ext.ops import conv3d, memory, norm, reference, trilinear
from timm_ext.ops import depthwise_conv3d as depthwise
from timm_ext.ops import upsampled_conv3d as upsampled

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Sample:
    """An operator.

    Attributes:
        function: its documented function, None where there is none of the operator's own arguments.
        twin: in `reference`; its parameters are those of the schema, in order.
        calls: arguments in the order of the schema, drawn anew each time.
        differentiable: whether there are derivatives.
        changed: places of the arguments that are changed in place.
    """

    function: Callable[..., Any] | None
    twin: Callable[..., Any]
    calls: Sequence[Callable[[], Arguments]]
    differentiable: bool = False
    changed: tuple[int, ...] = ()

    def named(self, arguments: Arguments) -> dict[str, Any]:
        """The arguments by the names of the twin's parameters."""
        return dict(zip(signature(self.twin).parameters, arguments, strict=False))


def drawn(*sizes: int) -> Tensor:
    return torch.randn(sizes)


def merged(weighted: bool = True, lengths: tuple[int, ...] = (3, 1, 9)) -> Arguments:
    """theta, fisher, log-weights and offsets."""
    elements = sum(lengths)
    fisher = torch.rand(3, elements) + 0.1 if weighted else None
    return drawn(3, elements), fisher, drawn(len(lengths), 3), torch.tensor([0, *lengths]).cumsum(0)


def merged_in_part() -> Arguments:
    """A model is left out, and an element has no Fisher."""
    theta, fisher, rows, offsets = merged()
    rows[:, 2], fisher[:, 0] = -torch.inf, 0
    return theta, fisher, rows, offsets


def with_gradient(arguments: Arguments, *more: Any) -> Arguments:
    return torch.randn_like(arguments[0][0]), *arguments, *more


def with_out(arguments: Arguments) -> Arguments:
    return *arguments, torch.empty_like(arguments[0][0])


def normalised() -> Arguments:
    input = drawn(2, 3, 4, 5)
    return torch.randn_like(input), input, *reference.group_norm(input, groups=3)[1:]


def halves(*sizes: int) -> Tensor:
    return drawn(*sizes).bfloat16()


def normalised_points() -> Arguments:
    input = halves(2, 20, 3)
    return halves(2, 20, 3), input, *reference.channels_last_norm(input, groups=3)[1:]


def sums() -> Tensor:
    return drawn(2, 4, 5, 11, 7)


def squares(dtype: torch.dtype, examples: int) -> Arguments:
    shapes = [(3, 5), (0,), (), (700,), (2, 3, 4, 5)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    grads = [torch.randn(shape).to(dtype) for _ in range(examples) for shape in shapes]
    return [torch.rand(shape, dtype=wide) for shape in shapes], grads, 0.5


def logits_of(mixing: str) -> Arguments:
    return (drawn(4, 3).abs() if mixing == "ratios" else drawn(4, 3)), mixing


MIXINGS = ("sigmoid", "softmax", "ratios")
KEYS = torch.tensor([3, -(2**62)])
_merge = partial(reference.fused_merge, mixing="softmax")  # of weights that are exp(log_weight)

SAMPLES: dict[str, Sample] = {
    "fused_merge": Sample(
        None,
        _merge,
        [merged, lambda: merged(False), lambda: merged(True, ()), merged_in_part],
        differentiable=True,
    ),
    "fused_merge.out": Sample(
        None,
        lambda theta, fisher, log_weight, offsets, out: _merge(theta, fisher, log_weight, offsets, out=out),
        [lambda: with_out(merged()), lambda: with_out(merged(False))],
        changed=(4,),
    ),
    "fused_merge_backward_log_weight": Sample(
        None,
        reference.fused_merge_backward_log_weight,
        [
            lambda: with_gradient(merged()),
            lambda: with_gradient(merged(False)),
            lambda: with_gradient(merged_in_part()),
        ],
        differentiable=True,
    ),
    "fused_merge_backward_matrices": Sample(
        None,
        reference.fused_merge_backward_matrices,
        [
            lambda: with_gradient(merged(), True, True),
            lambda: with_gradient(merged(False), True, False),
            lambda: with_gradient(merged_in_part(), False, True),
        ],
        differentiable=True,
    ),
    "log_weights": Sample(
        None, reference.log_weights, [partial(logits_of, mixing) for mixing in MIXINGS], differentiable=True
    ),
    "log_weights_backward": Sample(
        None,
        reference.log_weights_backward,
        [lambda mixing=mixing: (drawn(4, 3), *logits_of(mixing)) for mixing in MIXINGS],
        differentiable=True,
    ),
    "square_accumulate_": Sample(
        timm_ext.square_accumulate_,
        reference.square_accumulate_,
        [
            lambda: squares(torch.float32, 1),
            lambda: squares(torch.bfloat16, 3),
            lambda: squares(torch.float16, 1),
            lambda: squares(torch.float64, 2),
        ],
        changed=(0,),
    ),
    "conv_weight_grad_square_": Sample(
        timm_ext.conv_weight_grad_square_,
        reference.conv_weight_grad_square_,
        [
            lambda: (torch.rand(4, 2, 3), drawn(2, 4, 5), drawn(2, 2, 7), [1], [0], [1], 1, 1.0),
            lambda: (
                torch.rand(4, 2, 3, 2),
                drawn(2, 4, 3, 5),
                drawn(2, 4, 5, 6),
                [2, 1],
                [1, 0],
                [1, 1],
                2,
                0.3,
            ),
            lambda: (
                torch.rand(3, 2, 3, 3, 3),
                drawn(2, 3, 3, 3, 5),
                drawn(2, 2, 5, 6, 7),
                [2, 2, 1],
                [1, 1, 0],
                [1, 1, 1],
                1,
                1.0,
            ),
        ],
        changed=(0,),
    ),
    "sample_labels": Sample(
        timm_ext.sample_labels,
        reference.sample_labels,
        [
            lambda: (drawn(2, 3, 4, 5), KEYS, "bernoulli", True),
            lambda: (drawn(2, 3, 4, 5), KEYS, "categorical", True),
            lambda: (drawn(2, 3).double(), KEYS, "categorical", False),
        ],
    ),
    "group_norm": Sample(
        norm.group_norm,
        reference.group_norm,
        [
            lambda: (drawn(2, 3, 4, 5), torch.rand(3), None, 3, 1e-5),
            lambda: (drawn(2, 6, 4), None, drawn(6), 2, 1e-2),
        ],
    ),
    "batch_norm": Sample(
        norm.batch_norm,
        reference.batch_norm,
        [
            lambda: (drawn(2, 3, 4, 5), torch.rand(3), None, 1e-5),
            lambda: (drawn(2, 3, 4), None, drawn(3), 1e-2),
        ],
    ),
    "norm_backward": Sample(
        norm.norm_backward,
        reference.norm_backward,
        [
            lambda: (*normalised(), torch.rand(3), drawn(3), torch.tensor([0.3]), 1e-5, "groups", False),
            lambda: (*normalised(), None, None, None, 1e-2, "groups", False),
            lambda: (drawn(2, 3, 4), drawn(2, 3, 4), *[torch.rand(3)] * 5, 1e-5, "batch", True),
            lambda: (drawn(2, 3, 4), drawn(2, 3, 4), *[None] * 4, torch.rand(3), 1e-5, "nothing", True),
        ],
    ),
    "channels_last_norm": Sample(
        channels_last.channels_last_norm,
        reference.channels_last_norm,
        [
            lambda: (halves(2, 20, 3), torch.rand(3), None, 3, 1e-5),
            lambda: (halves(2, 4, 6), None, drawn(6), 2, 1e-2),
        ],
    ),
    "channels_last_sums": Sample(
        channels_last.channels_last_sums, reference.channels_last_sums, [lambda: (halves(2, 20, 3),)]
    ),
    "channels_last_norm_backward": Sample(
        channels_last.channels_last_norm_backward,
        reference.channels_last_norm_backward,
        [
            lambda: (*normalised_points(), torch.rand(3), drawn(3), 0.3, 1e-5),
            lambda: (*normalised_points(), None, None, 1.0, 1e-2),
        ],
    ),
    "upsample_trilinear3d": Sample(
        trilinear.upsample_trilinear3d, reference.upsample_trilinear3d, [lambda: (drawn(2, 3, 2, 5, 3),)]
    ),
    "upsample_trilinear3d_backward": Sample(
        trilinear.upsample_trilinear3d_backward,
        reference.upsample_trilinear3d_backward,
        [lambda: (drawn(2, 3, 4, 10, 6),)],
    ),
    "upsample_nearest3d": Sample(
        upsampled.upsample_nearest3d, reference.upsample_nearest3d, [lambda: (drawn(2, 3, 2, 5, 3),)]
    ),
    "conv3d_weight_gradient": Sample(
        conv3d.conv3d_weight_gradient,
        reference.conv3d_weight_gradient,
        [
            lambda: (drawn(2, 4, 6, 7, 6), drawn(2, 3, 6, 7, 6), [3] * 3, [1] * 3, [1] * 3, [1] * 3, 1),
            lambda: (
                drawn(2, 4, 3, 3, 4),
                drawn(2, 6, 4, 5, 6),
                [2, 3, 3],
                [2, 1, 1],
                [1, 1, 0],
                [1, 2, 1],
                2,
            ),
            lambda: (drawn(2, 9, 1, 2, 2), drawn(2, 5, 1, 2, 2), [3] * 3, [1] * 3, [1] * 3, [1] * 3, 1),
            lambda: (
                drawn(2, 4, 6, 7, 6).bfloat16(),
                drawn(2, 3, 6, 7, 6).bfloat16(),
                [3] * 3,
                [1] * 3,
                [1] * 3,
                [1] * 3,
                1,
            ),
        ],
    ),
    "depthwise_conv3d": Sample(
        depthwise.depthwise_conv3d,
        reference.depthwise_conv3d,
        [
            lambda: (drawn(2, 3, 4, 5, 6), drawn(3, 1, 3, 3, 3), drawn(3), [1] * 3, [1] * 3, [1] * 3),
            lambda: (drawn(2, 3, 4, 9, 6), drawn(3, 1, 2, 5, 3), None, [2, 3, 2], [1, 0, 2], [1, 2, 1]),
        ],
    ),
    "depthwise_conv_transpose3d": Sample(
        depthwise.depthwise_conv_transpose3d,
        reference.depthwise_conv_transpose3d,
        [
            lambda: (
                drawn(2, 3, 2, 3, 3),
                drawn(3, 1, 3, 3, 3),
                drawn(3),
                [2] * 3,
                [1] * 3,
                [1] * 3,
                [4, 5, 6],
            ),
            lambda: (
                drawn(1, 2, 4, 2, 6),
                drawn(2, 1, 1, 2, 3),
                None,
                [1] * 3,
                [0] * 3,
                [1, 2, 1],
                [4, 4, 8],
            ),
        ],
    ),
    "small_conv3d": Sample(
        conv3d.small_conv3d,
        reference.small_conv3d,
        [
            lambda: (
                drawn(2, 3, 4, 5, 6),
                drawn(4, 3, 2, 3, 3),
                drawn(4),
                [2, 1, 1],
                [1, 1, 0],
                [1, 2, 1],
                False,
            ),
            lambda: (drawn(2, 3, 4, 5, 6), drawn(3, 4, 2, 3, 3), None, [1] * 3, [1, 1, 0], [1, 2, 1], True),
        ],
    ),
    "strided_conv3d_input_gradient": Sample(
        conv3d.strided_conv3d_input_gradient,
        reference.strided_conv3d_input_gradient,
        [lambda: (drawn(2, 3, 2, 3, 3), drawn(3, 4, 3, 3, 3), [4, 5, 6])],
    ),
    "upsampled_conv3d": Sample(
        upsampled.upsampled_conv3d,
        reference.upsampled_conv3d,
        [lambda: (drawn(2, 3, 2, 5, 3), drawn(4, 3, 3, 3, 3), drawn(4))],
    ),
    "neighbour_sums3d": Sample(
        upsampled.neighbour_sums3d, reference.neighbour_sums3d, [lambda: (drawn(2, 4, 4, 10, 6),)]
    ),
    "upsampled_conv3d_input_gradient": Sample(
        upsampled.upsampled_conv3d_input_gradient,
        reference.upsampled_conv3d_input_gradient,
        [lambda: (sums(), drawn(4, 3, 3, 3, 3))],
    ),
    "upsampled_conv3d_weight_grad_square_": Sample(
        upsampled.upsampled_conv3d_weight_grad_square_,
        reference.upsampled_conv3d_weight_grad_square_,
        [lambda: (torch.rand(4, 3, 3, 3, 3), sums(), drawn(2, 3, 2, 5, 3), 0.5)],
        changed=(0,),
    ),
    "winograd_conv3d": Sample(
        conv3d.winograd_conv3d,
        reference.winograd_conv3d,
        [
            lambda: (drawn(2, 3, 4, 5, 6), drawn(4, 3, 3, 3, 3), drawn(4), [1, 1, 0], False),
            lambda: (drawn(2, 3, 4, 5, 6), drawn(3, 4, 3, 3, 3), None, [1, 0, 2], True),
            lambda: (drawn(2, 3, 4, 9, 6), drawn(4, 3, 1, 3, 1), drawn(4), [0, 1, 0], False),
            lambda: (drawn(1, 3, 5, 4, 6), drawn(2, 3, 5, 5, 5), drawn(2), [2, 2, 2], False),
        ],
    ),
    "new_tensor": Sample(
        memory.new_tensor, reference.new_tensor, [lambda: (drawn(1), [2, 0, 3])]
    ),  # values are any
}
