"""Good calls of operators with arguments spoilt: other types, shapes and numbers."""

import random
import re
from collections.abc import Callable
from typing import Any

import torch
from operator_samples import SAMPLES
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import timm_ext
from fuzz.tensors import OWN_MESSAGE, view
from timm_ext.errors import InputError

ODD_INTEGERS = [-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 5, 100, 2**31 - 1, 2**31, 2**32, 2**40]
ODD_INTEGERS += [2**61 - 1, 2**61, 2**62, 2**63 - 1, 2**63, 2**70]

Call = tuple[Callable[..., Any], dict[str, Any]]

# What tensors without values and memory cannot know.
UNKNOWN = re.compile(
    "share memory|have memory|is memory on|strictly increasing|go from 0 to P|expected rows of logits"
)


def spoilt_call(rng: random.Random) -> Call:
    """A function and its arguments, one or two of which are spoilt."""
    torch.manual_seed(rng.getrandbits(60))
    function, arguments = rng.choice(GOOD)()
    for name in rng.sample(list(arguments), min(len(arguments), rng.randint(1, 2))):
        arguments[name] = spoilt(rng, arguments[name])
    return function, arguments


def _merge() -> Call:
    groups, out = torch.tensor([0, 1, 2]), torch.empty(10)
    named = {"theta": torch.randn(2, 10), "fisher": torch.rand(2, 10), "logits": torch.zeros(3, 2)}
    return timm_ext.fused_merge, named | {
        "offsets": torch.tensor([0, 2, 5, 10]),
        "groups": groups,
        "out": out,
    }


GOOD: list[Callable[[], Call]] = [_merge] * 3
for _sample in SAMPLES.values():
    if _sample.function is not None:
        GOOD += [lambda s=_sample, c=call: (s.function, s.named(c())) for call in _sample.calls]


def check_on_meta(function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Hold a call on `meta` tensors to what the same call on the CPU gives: shapes, or the same words."""
    bare = tree_map(_bare, arguments)
    here, there = outcome(function, arguments), outcome(function, bare)
    if not (isinstance(here, str) and UNKNOWN.search(here)):
        assert there == here, f"{there} on meta for {here}"


def _bare(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def outcome(function: Callable[..., Any], arguments: dict[str, Any]) -> object:
    """What came: shapes and types of the results, or the message; any other exception is raised."""
    try:
        results = function(**arguments)
    except InputError as error:
        return str(error)
    except RuntimeError as error:
        if not OWN_MESSAGE.match(str(error)):
            raise
        return str(error)
    return [(list(value.shape), value.dtype) for value in tree_leaves(results) if isinstance(value, Tensor)]


def spoilt(rng: random.Random, value: Any) -> Any:
    if isinstance(value, Tensor):
        return _spoilt_tensor(rng, value)
    if isinstance(value, list):
        changed = list(value)
        for _ in range(rng.randint(1, 3)):
            changed[rng.randrange(len(changed))] = rng.choice(ODD_INTEGERS)
        return rng.choice([changed, changed, changed, [*value, 1], value[:-1], [], [1.5] * len(value), ["1"]])
    if isinstance(value, str):
        return rng.choice(["", "both", "categorical"])
    odd = isinstance(value, int) and not isinstance(value, bool)
    return rng.choice(ODD_INTEGERS) if odd else value


def _spoilt_tensor(rng: random.Random, value: Tensor) -> Any:
    match rng.randrange(9):
        case 0:
            plain = value.float() if value.dtype == torch.bfloat16 else value  # which NumPy lacks
            return plain.numpy() if rng.random() < 0.5 else value.tolist()
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
