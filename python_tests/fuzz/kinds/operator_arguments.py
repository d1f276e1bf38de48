"""Good calls of operators with arguments spoilt, on the CPU and on tensors without values."""

import random
from pathlib import Path

from fuzz import Outcome, kind
from fuzz.operator_calls import check_on_meta, spoilt_call
from fuzz.tensors import clear

from timm_ext.ops.memory import kept_memory


@kind("operators-odd-arguments", megabytes=2000)
def odd_arguments(rng: random.Random, folder: Path) -> Outcome:
    """A result, or an error that names what was wrong."""
    function, arguments = spoilt_call(rng)
    with kept_memory():
        clear(lambda: function(**arguments))
    return Outcome.RIGHT


@kind("operators-odd-arguments-on-meta", megabytes=2000)
def odd_arguments_on_meta(rng: random.Random, folder: Path) -> Outcome:
    """The same shapes or the same words as on the CPU."""
    check_on_meta(*spoilt_call(rng))
    return Outcome.RIGHT
