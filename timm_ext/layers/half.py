"""Which arithmetic bfloat16 on the CPU takes here."""

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from timm_ext.layers.channels_last import channels_first, is_channels_last
from timm_ext.ops.memory import new_tensor

Path = Literal["amx", "avx512_bf16", "float32"]


@lru_cache(maxsize=1)
def half_path() -> tuple[Path, str]:
    """Return how `bf16-mixed` is computed on this machine's CPU, and why.

    Returns:
        `amx`: larger convolutions by oneDNN on tiles; `avx512_bf16`: volumes are stored in bfloat16 and
        computed in float32; `float32`: bfloat16 would be slower, and float32 takes its place.
        Then one line with the reason.
    """
    bf16, amx = torch.cpu._is_avx512_bf16_supported(), torch.cpu._is_amx_tile_supported()
    if amx and bf16 and torch.backends.mkldnn.is_available():
        return "amx", "the CPU has AMX"
    if bf16:
        return "avx512_bf16", "the CPU has AVX512-BF16, but no AMX that PyTorch can use"
    return "float32", "the CPU has neither AMX nor AVX512-BF16, without which bfloat16 is slower than float32"


def cast(volume: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a volume on the CPU in another type, contiguous, in memory that is kept; not differentiable."""
    if volume.dtype == dtype:
        return volume
    source = channels_first(volume) if is_channels_last(volume) else volume
    return new_tensor(volume.new_empty(0, dtype=dtype), volume.shape).copy_(source)
