"""Good calls of operators with arguments spoilt: other types, shapes and numbers."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fuzz import Outcome, kind
from fuzz.tensors import clear, view
from torch import Tensor

import timm_ext
from timm_ext.ops import conv3d as layer_ops
from timm_ext.ops import norm as norm_ops
from timm_ext.ops import upsampled_conv3d as doubling_ops
from timm_ext.ops.memory import kept_memory, new_tensor

ODD_INTEGERS = [-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 5, 100, 2**31 - 1, 2**31, 2**32, 2**40]
ODD_INTEGERS += [2**61 - 1, 2**61, 2**62, 2**63 - 1, 2**63, 2**70]
GOOD: dict[str, Callable[[], tuple[Callable[..., Any], dict[str, Any]]]] = {
    "fused_merge": lambda: (
        timm_ext.fused_merge,
        {
            "theta": torch.randn(2, 10),
            "fisher": torch.rand(2, 10),
            "logits": torch.zeros(3, 2),
            "offsets": torch.tensor([0, 2, 5, 10]),
            "groups": torch.tensor([0, 1, 2]),
            "out": torch.empty(10),
        },
    ),
    "conv_weight_grad_square_": lambda: (
        timm_ext.conv_weight_grad_square_,
        {
            "acc": torch.zeros(4, 2, 2, 2, 2),
            "grad": torch.randn(2, 4, 2, 2, 2),
            "input": torch.randn(2, 2, 3, 3, 3),
            "stride": [1] * 3,
            "padding": [0] * 3,
            "dilation": [1] * 3,
            "groups": 1,
        },
    ),
    "sample_labels": lambda: (
        timm_ext.sample_labels,
        {"logits": torch.randn(2, 3, 4), "keys": torch.tensor([1, 2]), "likelihood": "bernoulli"},
    ),
    "small_conv3d": lambda: (
        layer_ops.small_conv3d,
        {
            "input": torch.randn(2, 2, 3, 3, 3),
            "weight": torch.randn(4, 2, 2, 2, 2),
            "bias": torch.randn(4),
            "stride": [1] * 3,
            "padding": [1] * 3,
            "dilation": [1] * 3,
        },
    ),
    "winograd_conv3d": lambda: (
        layer_ops.winograd_conv3d,
        {
            "input": torch.randn(2, 2, 3, 3, 3),
            "weight": torch.randn(4, 2, 3, 3, 3),
            "bias": torch.randn(4),
            "padding": [1] * 3,
        },
    ),
    "strided_conv3d_input_gradient": lambda: (
        layer_ops.strided_conv3d_input_gradient,
        {"grad": torch.randn(1, 2, 2, 2, 2), "weight": torch.randn(2, 3, 3, 3, 3), "size": [4, 4, 3]},
    ),
    "doubled_conv3d": lambda: (
        doubling_ops.doubled_conv3d,
        {"input": torch.randn(1, 2, 2, 2, 2), "weight": torch.randn(3, 2, 3, 3, 3), "bias": torch.randn(3)},
    ),
    "doubled_conv3d_input_gradient": lambda: (
        doubling_ops.doubled_conv3d_input_gradient,
        {"sums": torch.randn(1, 2, 3, 5, 3), "weight": torch.randn(2, 3, 3, 3, 3)},
    ),
    "doubled_conv3d_weight_grad_square_": lambda: (
        doubling_ops.doubled_conv3d_weight_grad_square_,
        {
            "accumulator": torch.zeros(2, 3, 3, 3, 3),
            "sums": torch.randn(1, 2, 3, 5, 3),
            "input": torch.randn(1, 3, 1, 2, 1),
        },
    ),
    "neighbour_sums3d": lambda: (doubling_ops.neighbour_sums3d, {"input": torch.randn(1, 2, 2, 3, 2)}),
    "instance_norm": lambda: (
        norm_ops.instance_norm,
        {"input": torch.randn(2, 3, 4), "weight": torch.randn(3), "bias": torch.randn(3)},
    ),
    "instance_norm_backward": lambda: (
        norm_ops.instance_norm_backward,
        {
            "grad": torch.randn(2, 3, 4),
            "input": torch.randn(2, 3, 4),
            "mean": torch.randn(6),
            "deviation": torch.rand(6),
            "weight": torch.randn(3),
            "bias": torch.randn(3),
        },
    ),
    "new_tensor": lambda: (new_tensor, {"like": torch.zeros(1), "sizes": [2, 3]}),
}


@kind("operators-odd-arguments", megabytes=2000)
def odd_arguments(rng: random.Random, folder: Path) -> Outcome:
    """Good calls with one or two arguments spoilt: a result, or an error that names what was wrong."""
    torch.manual_seed(rng.getrandbits(60))
    function, arguments = GOOD[rng.choice(list(GOOD))]()
    for name in rng.sample(list(arguments), min(len(arguments), rng.randint(1, 2))):
        arguments[name] = _spoilt(rng, arguments[name])
    with kept_memory():
        clear(lambda: function(**arguments))
    return Outcome.RIGHT


def _spoilt(rng: random.Random, value: Any) -> Any:
    if isinstance(value, Tensor):
        return _spoilt_tensor(rng, value)
    if isinstance(value, list):
        changed = list(value)
        for _ in range(rng.randint(1, 3)):
            changed[rng.randrange(len(changed))] = rng.choice(ODD_INTEGERS)
        return rng.choice([changed, changed, changed, [*value, 1], value[:-1], [], [1.5] * len(value), ["1"]])
    return rng.choice(ODD_INTEGERS) if isinstance(value, int) else rng.choice(["", "both", "categorical"])


def _spoilt_tensor(rng: random.Random, value: Tensor) -> Any:
    match rng.randrange(9):
        case 0:
            return value.numpy() if rng.random() < 0.5 else value.tolist()
        case 1:
            return value.to(rng.choice([torch.float32, torch.float64, torch.bfloat16]))
        case 2:
            return value.to(
                rng.choice([torch.complex64, torch.float16, torch.int32, torch.int64, torch.bool])
            )
        case 3:
            axis = rng.randrange(value.ndim)
            return value.narrow(axis, 0, rng.randint(0, value.shape[axis]))
        case 4:
            return value.unsqueeze(rng.randint(0, value.ndim)) if rng.random() < 0.5 else value.flatten()
        case 5:
            axis = rng.randrange(value.ndim)
            return torch.cat([value, value], axis)
        case 6:
            return value.transpose(0, -1)
        case 7:
            return value[:1].expand_as(value)
        case _:
            return view(rng, value)
