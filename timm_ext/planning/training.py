"""Patch, batch, depth and steps of a training, planned from the shapes of the prepared cases."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Any

import numpy as np

from timm_ext.data.grid import Triple
from timm_ext.errors import InputError
from timm_ext.inference import fitting_size
from timm_ext.networks.registry import network_spec
from timm_ext.planning.budget import Machine
from timm_ext.planning.footprint import Footprint, footprint_of

_LARGEST_EDGE = 256  # of an isotropic patch that is not limited by the data
_SMALLEST_EDGE = 32  # to which a patch shrinks, unless the volumes are smaller
_COARSEST_EDGE = 4  # voxels of the coarsest grid along each axis
_MOST_LEVELS = 5
_BATCH = 2
_MOST_OF_DATA = 0.05  # of all voxels in one batch
_EPOCHS = 500
_FEWEST_STEPS = 1000
_MOST_STEPS = {"cpu": 5000, "gpu": 50_000}
_TRAINING_PER_VALIDATION = 4  # times as long is trained as validated
_PASS = 1 / 3  # of a step: its forward


@dataclass(frozen=True)
class Choice:
    """The network, and what the user has decided already; None is left to planning.

    Attributes:
        network: `network_config`; its depth is planned unless `fixed` or among its options.
        fixed: the network exists and keeps its depth.
        patch: edges D, H, W.
        whole: whole volumes instead of patches.
        batch_size: examples per step.
        steps: optimisation steps at most.
        share: of the steps of a whole training that are planned.
    """

    network: Mapping[str, Any]
    fixed: bool = False
    patch: Triple | None = None
    whole: bool = False
    batch_size: int | None = None
    steps: int | None = None
    share: float = 1.0


@dataclass(frozen=True)
class TrainingConfiguration:
    """A training that fits the data and the machine.

    Attributes:
        network: `network_config` with its depth.
        patch: edges D, H, W; None for whole volumes.
        size: edges of what the network takes at a time; for whole volumes those of the largest.
        batch_size: examples per step.
        steps: optimisation steps at most.
        validate_every: steps between validations.
        footprint: of the network.
        validation: voxels that all windows of a validation hold.
        step_bytes: reckoned peak of a step on one device.
    """

    network: dict[str, Any]
    patch: Triple | None
    size: Triple
    batch_size: int
    steps: int
    validate_every: int
    footprint: Footprint
    validation: int
    step_bytes: int

    @property
    def voxels(self) -> int:
        """Voxels of all examples of a step together."""
        return self.batch_size * prod(self.size)

    @property
    def validation_in_steps(self) -> float:
        """About how many steps take as long as a validation."""
        return _PASS * self.validation / self.voxels


def configure_training(
    train_shapes: Sequence[Triple],
    val_shapes: Sequence[Triple],
    spacing: tuple[float, float, float],
    machine: Machine,
    choice: Choice,
) -> TrainingConfiguration:
    """Plan a training, a function of its arguments alone.

    As in nnU-Net, the patch begins with the proportions of the field of view of 256³ isotropic voxels, cut to
    the median shape, and shrinks along the axis that covers most of the median shape until a batch of two
    fits. A network whose depth is open halves its grid as often as leaves four voxels along each axis, at
    most four times. Left room makes batches larger, up to 5 % of all voxels, on a GPU alone: on a CPU a
    step's time grows with it. A run takes 500 epochs, at least 1000 steps and at most 5000 on a CPU or 50,000
    on a GPU; validations by sliding windows come so seldom that they take at most a fifth of the time.

    Source: Isensee et al., nnU-Net, Nature Methods 2021, and the planner of its version 2; the numbers of
    steps and the limits of a CPU are our own.

    Args:
        train_shapes: D, H, W of the prepared training cases.
        val_shapes: of the validation cases.
        spacing: voxel size in mm along D, H, W.
        machine: see `this_machine`.
        choice: network, and what is decided already.

    Raises:
        InputError: a patch that the network does not take, or as for `footprint_of`.
    """
    median = np.median([*train_shapes, *val_shapes], axis=0)
    batch = choice.batch_size or ceil(_BATCH / machine.devices) * machine.devices
    if choice.whole:
        network = _of_depth(choice, None)
        footprint = footprint_of(network)
        largest = np.max([*train_shapes, *val_shapes], axis=0).tolist()
        patch, size = None, fitting_size(largest, footprint.divisor)
    else:
        patch = choice.patch or _shrunk(_start(median, spacing), median, batch, machine, choice)
        network = _of_depth(choice, patch, exact=True)
        footprint = footprint_of(network)
        _check_divisible(patch, network)
        size = patch
    if choice.batch_size is None and machine.kind == "gpu":
        batch = _larger(batch, prod(size), float(median.prod()) * len(train_shapes), footprint, machine)
    epoch = ceil(len(train_shapes) / batch)
    steps = min(max(_EPOCHS * epoch, _FEWEST_STEPS), _MOST_STEPS[machine.kind])
    made = TrainingConfiguration(
        network=network,
        patch=patch,
        size=size,
        batch_size=batch,
        steps=choice.steps or ceil(choice.share * steps),
        validate_every=epoch,
        footprint=footprint,
        validation=sum(sliding_voxels(shape, patch, footprint.divisor) for shape in val_shapes),
        step_bytes=footprint.step_bytes(ceil(batch * prod(size) / machine.devices)),
    )
    seldom = ceil(_TRAINING_PER_VALIDATION * made.validation_in_steps)
    return replace(made, validate_every=min(max(epoch, seldom), made.steps))


def sliding_voxels(shape: Triple, window: Triple | None, divisor: int, overlap: float = 0.5) -> int:
    """Return the voxels that a network sees of one volume, window by window or whole."""
    if window is None:
        return prod(fitting_size(shape, divisor))
    size = fitting_size(window, divisor)
    counts = (
        max(ceil((length - edge) / max(int(edge * (1 - overlap)), 1)), 0) + 1
        for length, edge in zip(shape, size, strict=True)
    )
    return prod(size) * prod(counts)


def _check_divisible(patch: Triple, network: Mapping[str, Any]) -> None:
    spec, options = network_spec(network["name"]), network["options"]
    divisors = (spec.divisor(options),) * 3 if spec.divisors is None else spec.divisors(options)
    if any(edge % divisor for edge, divisor in zip(patch, divisors, strict=True)):
        by = divisors[0] if len(set(divisors)) == 1 else list(divisors)
        raise InputError(
            f"train.patch: expected edges that {spec.name} takes, divisible by {by} (got {list(patch)})"
        )


def _start(median: Any, spacing: tuple[float, float, float]) -> Triple:
    """Return the largest patch worth a thought."""
    density = 1 / np.array(spacing)
    edges = np.rint(density * _LARGEST_EDGE / np.cbrt(density.prod()))
    depth, height, width = np.maximum(np.ceil(np.minimum(edges, median)), 1).astype(int).tolist()
    return depth, height, width


def _shrunk(patch: Triple, median: Any, batch: int, machine: Machine, choice: Choice) -> Triple:
    """Shrink a patch until a batch of it fits the machine, or it is as small as patches get."""
    while True:
        footprint = footprint_of(_of_depth(choice, patch))
        divisor = footprint.divisor
        patch = fitting_size(patch, divisor)
        voxels = batch * prod(patch)
        fits = footprint.step_bytes(ceil(voxels / machine.devices)) <= machine.step_bytes
        smaller = [axis for axis in range(3) if patch[axis] - divisor >= max(_SMALLEST_EDGE, divisor)]
        if (fits and footprint.flops * voxels <= machine.step_flops) or not smaller:
            return patch
        # Of axes that cover alike shares of the median shape the longest.
        axis = max(smaller, key=lambda axis: (round(patch[axis] / median[axis], 2), patch[axis]))
        depth, height, width = (edge - divisor * (place == axis) for place, edge in enumerate(patch))
        patch = depth, height, width


def _of_depth(choice: Choice, patch: Triple | None, *, exact: bool = False) -> dict[str, Any]:
    """Return the network's config with its depth: as given, or as many levels as the patch has room for.

    Args:
        choice: the network.
        patch: None for the depth that the network has by default.
        exact: the patch must be divisible as it is.
    """
    spec = network_spec(choice.network["name"])
    options = {**spec.defaults, **choice.network["options"]}
    if spec.depth is not None and not choice.fixed and spec.depth not in choice.network["options"] and patch:
        levels = 2
        while levels < _MOST_LEVELS and min(patch) >= _COARSEST_EDGE << levels:
            if exact and any(edge % (1 << levels) for edge in patch):
                break
            levels += 1
        options[spec.depth] = levels
    return {**choice.network, "options": options}


def _larger(batch: int, voxels: int, all_voxels: float, footprint: Footprint, machine: Machine) -> int:
    """Fill a GPU's memory, with a multiple of the devices and not more than a share of the data."""
    one = footprint.step_bytes(voxels) - footprint.step_bytes(0)
    room = int((machine.step_bytes - footprint.step_bytes(0)) // one) * machine.devices
    wanted = min(room, round(_MOST_OF_DATA * all_voxels / voxels))
    return max(batch, wanted // machine.devices * machine.devices)
