"""Norms by the statistics of their input, and batch norm by given ones."""

import math
from typing import Any

import torch
from torch import Tensor

from timm_ext.layers.nodes import BatchNormNode, GroupNormNode
from timm_ext.layers.nodes.norm import Track, serves
from timm_ext.layers.tape import Call, Norm, Tape


def instance_norm(
    tape: Tape,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """By the statistics of the input; those of all examples may be tracked."""
    points = math.prod(input.shape[2:])
    if not use_input_stats or input.dim() < 3 or points < 2:
        return None
    running, track = (running_mean, running_var), None
    if running_mean is not None or running_var is not None:
        if not serves(input) or not _fit(running, input):
            return None
        track = _tracking(running, momentum, points, len(input))
    if (call := tape.claim(input, weight, bias)) is None:
        return None
    call.rule, call.invariant = "instance norm", True
    return _normalise(GroupNormNode, call, input, weight, bias, input.shape[1], eps, track)


def group_norm(
    tape: Tape,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    """Of any number of groups."""
    if input.dim() < 2 or num_groups < 1 or input.shape[1] % num_groups or input.numel() <= num_groups:
        return None
    if (call := tape.claim(input, weight, bias)) is None:
        return None
    call.rule, call.invariant = "group norm", num_groups == input.shape[1] and input.dim() > 2
    return _normalise(GroupNormNode, call, input, weight, bias, num_groups, eps, None)


def batch_norm(
    tape: Tape,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """Of float32 on the CPU, by the statistics of the batch, which may be tracked, or by given ones."""
    running, track = (running_mean, running_var), None
    given = running_mean is not None or running_var is not None
    if not serves(input) or not (_fit(running, input) if given else training):
        return None
    points = input.numel() // max(input.shape[1], 1)
    if training and points < 2:
        return None
    if training and given:
        track = _tracking(running, momentum, points, 1)
    if (call := tape.claim(input, weight, bias)) is None:
        return None
    call.rule, call.invariant = "batch norm", training
    return _normalise(BatchNormNode, call, input, weight, bias, None if training else running, eps, track)


def _normalise(
    node: Any, call: Call, input: Tensor, weight: Tensor | None, bias: Tensor | None, *options: Any
) -> Tensor:
    parameters = call.entering(weight, bias)
    output: Tensor = node.apply(input, call.anchor, *parameters, *options, call)
    call.tape.normalised = Norm(call, input, *parameters)
    return output


def _fit(running: tuple[Tensor | None, Tensor | None], input: Tensor) -> bool:
    """Tell whether running statistics are plain ones, of the input's channels."""
    return all(
        isinstance(one, Tensor)
        and type(one) in (Tensor, torch.nn.Parameter)
        and one.dtype == torch.float32
        and one.device == input.device
        and one.shape == input.shape[1:2]
        and not one.requires_grad
        for one in running
    )


def _tracking(
    running: tuple[Tensor | None, Tensor | None], momentum: float, points: int, examples: int
) -> Track:
    """Return what updates running statistics by those of sets of so many points, averaged over examples.

    running ← (1 − m) running + m new,   the variance times N / (N − 1)
    """

    def track(mean: Tensor, variance: Tensor) -> None:
        of_mean, of_variance = running
        assert of_mean is not None
        assert of_variance is not None
        unbiased = variance * (points / (points - 1))
        of_mean.lerp_(mean.view(examples, -1).mean(0), momentum)
        of_variance.lerp_(unbiased.view(examples, -1).mean(0), momentum)

    return track
