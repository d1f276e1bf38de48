"""Which layers compute here, and why, in words."""

import os
from collections.abc import Mapping
from typing import Any

from timm_ext.layers.half import half_path

_SWITCHES = "off by train.fast_layers=false, predict.fast_layers=false, in a study fast_layers: false"


def paths_told(build: Mapping[str, Any], *, gpu: bool) -> dict[str, str]:
    """Return by subject which way trainings and predictions take, with the reason.

    Args:
        build: `timm_ext.build_info()`.
        gpu: whether trainings find a GPU.
    """
    isa = build["isa_chosen"]
    why = "TIMM_EXT_ISA says so" if os.environ.get("TIMM_EXT_ISA") else "the best that this CPU has"
    half, reason = half_path()
    ways = {
        "amx": "larger convolutions by oneDNN on AMX, all else in float32",
        "avx512_bf16": "volumes stored in bfloat16, computed in float32",
        "float32": "float32 in its place",
    }
    cpu = "on the CPU by these layers, since there is no GPU"
    return {
        "layers, float32 on a CPU": f"timm_ext.fast_layers by {isa}: {why}; {_SWITCHES}",
        "layers, bf16-mixed on a CPU": f"{ways[half]}: {reason}",
        "layers, GPU": "PyTorch's: fast_layers are for CPUs"
        if gpu
        else f"not used: {build['gpu'].removeprefix('none: ')}",
        "trainings": "on the GPU; train.accelerator=cpu takes the CPU" if gpu else cpu,
    }
