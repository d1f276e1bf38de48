"""What a training step of a network takes, reckoned without taking it."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from timm_ext.networks.registry import build_network

_EDGE = 32  # of the volume that is tried, at least
_STATE = 16  # bytes of weight, gradient and Adam's two moments per parameter
_WRITTEN = 16  # bytes of the copy that is written while training goes on: weight, moments, best weight
_BEYOND_SAVED = 2.0  # peak of a step over what its forward saves: gradients on their way, work space
_INFERENCE = 0.6  # peak of a pass without gradients over what training would save


@dataclass(frozen=True)
class Footprint:
    """What a network takes in float32, growing with the voxels of a batch.

    Attributes:
        parameters: their number.
        saved: bytes that the forward keeps for the backward, per voxel.
        flops: floating-point operations of forward and backward, per voxel.
        divisor: of every edge of an image.
    """

    parameters: int
    saved: float
    flops: float
    divisor: int

    def step_bytes(self, voxels: int) -> int:
        """Return the peak of a training step on a batch of so many voxels together."""
        return round((_STATE + _WRITTEN) * self.parameters + _BEYOND_SAVED * self.saved * voxels)

    def inference_bytes(self, voxels: int) -> int:
        """Return the peak of a pass without gradients over so many voxels together."""
        return round(4 * self.parameters + _INFERENCE * self.saved * voxels)


def footprint_of(config: Mapping[str, Any]) -> Footprint:
    """Reckon a network's footprint on a small volume, on PyTorch's `meta` device where it can run there.

    Args:
        config: `network_config` of `build_network`: `name`, `in_channels`, `out_channels`, `options`.

    Raises:
        InputError: as for `build_network`.
    """
    return _footprint(json.dumps(dict(config), sort_keys=True))


@lru_cache(maxsize=32)
def _footprint(config_json: str) -> Footprint:
    config = json.loads(config_json)
    try:
        return _tried(config, "meta")
    except Exception:
        # Networks that look at the values of tensors run only where there are some.
        return _tried(config, "cpu")


def _tried(config: Mapping[str, Any], device: str) -> Footprint:
    with torch.random.fork_rng(devices=[]), torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build_network(
            config["name"],
            in_channels=config["in_channels"],
            out_channels=config["out_channels"],
            **config["options"],
        )
        divisor: int = vars(model)["size_divisor"]
        edge = 2 * divisor if 2 * divisor >= _EDGE else _EDGE // divisor * divisor
        images = torch.zeros(1, config["in_channels"], edge, edge, edge)
        saved, flops = _measured(model, images)
    voxels = edge**3
    return Footprint(
        sum(value.numel() for value in model.parameters()), saved / voxels, flops / voxels, divisor
    )


def total_of(outputs: Any) -> Tensor:
    """Return the sum over all maps that a network returns; in deep supervision there are several."""
    return torch.stack([each.sum() for each in tree_leaves(outputs)]).sum()


def _measured(model: nn.Module, images: Tensor) -> tuple[int, int]:
    """Return the bytes that the forward saves, and the operations of forward and backward."""
    own = {value.untyped_storage()._cdata for value in model.parameters()}
    kept: dict[int, Any] = {}

    def note(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no other takes its address
        return value

    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(note, lambda value: value):
        total_of(model(images)).backward()
    return sum(storage.nbytes() for storage in kept.values()), counter.get_total_flops()
