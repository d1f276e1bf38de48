"""Predictions of nnU-Net's networks, as `nnUNetv2_predict` makes them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from timm_ext.data.formats.cases import Case
from timm_ext.data.mismatch import TaskMismatchError
from timm_ext.data.tasks import Labels, Task
from timm_ext.data.volume import Array, Volume, check_grid, read_channels, write_nifti
from timm_ext.errors import InputError, shown
from timm_ext.inference import labels_from_probabilities
from timm_ext.interop.nnunet.plans import configuration_of
from timm_ext.interop.nnunet.preparation import Preparation, preparation_of
from timm_ext.interop.nnunet.windows import window_logits
from timm_ext.networks.nnunet import divisors_of


@dataclass(frozen=True)
class Application:
    """How a network that nnU-Net trained is applied.

    Attributes:
        preparation: of scans.
        patch: edges of the sliding window.
        mirrored: axes along which mirror images are averaged.
        fast_layers: on a CPU by `timm_ext.fast_layers`.
    """

    preparation: Preparation
    patch: tuple[int, ...]
    mirrored: tuple[int, ...]
    fast_layers: bool = True


def application_of(noted: Mapping[str, Any], where: object) -> Application:
    """Read how a network is applied from what its file notes under `nnunet`.

    Raises:
        InputError: as for `configuration_of`, `divisors_of` and `preparation_of`; patches that the network
            cannot halve as often as its strides do.
    """
    configuration = configuration_of(noted["plans"], str(noted["configuration"]), where)
    divisors = divisors_of(configuration.options)
    if any(edge % divisor for edge, divisor in zip(configuration.patch, divisors, strict=False)):
        raise InputError(
            f"{where}: patch_size: expected multiples of {list(divisors)}, the network's strides (got "
            f"{list(configuration.patch)})"
        )
    preparation = preparation_of(noted["plans"], configuration, where)
    axes = noted.get("inference_allowed_mirroring_axes") or ()
    fits = isinstance(axes, (list, tuple)) and all(type(axis) is int and 0 <= axis <= 2 for axis in axes)
    if not fits or len(set(axes)) < len(axes):
        raise InputError(
            f"{where}: inference_allowed_mirroring_axes: expected axes 0, 1, 2, each once (got {shown(axes)})"
        )
    return Application(preparation, configuration.patch, tuple(axes))


def predict_case(
    model: nn.Module,
    case: Case,
    task: Task,
    application: Application,
    out_path: Path,
    *,
    probabilities_path: Path | None = None,
) -> Labels:
    """Segment a case and write the label map on the grid of its own files.

    Args:
        model: the network of the task.
        case: the input files.
        task: names the channels and the labels.
        application: how.
        out_path: the label map, `.nii` or `.nii.gz`.
        probabilities_path: also write the probability of each output here.

    Returns:
        The label map in the file's own axes.

    Raises:
        InputError: the case cannot be read or prepared, or the result cannot be written.
    """
    first, scan = read_scan(case, task)
    preparation = application.preparation
    image, placed = preparation.apply(scan, first.spacing[::-1], case.id)
    logits = window_logits(
        model,
        torch.from_numpy(image),
        application.patch,
        application.mirrored,
        fast_layers=application.fast_layers,
    )
    restored = torch.from_numpy(preparation.restore(logits.numpy(), placed))
    likely = (restored.softmax(0) if task.softmax else restored.sigmoid()).numpy()
    source = case.images[task.modalities[0]]
    if probabilities_path is not None:
        background = int(task.softmax)  # its probability outside of the box, in the first output
        outside = [background, *[0] * (len(likely) - 1)]
        maps = (preparation.paste(one, placed, value) for one, value in zip(likely, outside, strict=True))
        whole = np.stack([reversed_axes(one) for one in maps])
        write_nifti(probabilities_path, Volume(whole, first.affine), like=source)
    labels: Labels = reversed_axes(preparation.paste(labels_from_probabilities(likely, task), placed))
    write_nifti(out_path, Volume(labels, first.affine), like=source)
    return labels


def read_scan(case: Case, task: Task) -> tuple[Volume, Array]:
    """Return the first channel's volume, and all channels `[C, z, y, x]` float32.

    Raises:
        InputError: a channel is missing or cannot be read, or channels lie on different grids.
    """
    if missing := [name for name in task.modalities if name not in case.images]:
        told = f"{case.id}: missing modality {', '.join(missing)} of task {task.name}"
        raise TaskMismatchError(told, task.name, missing)
    volumes: list[Volume] = []
    for name in task.modalities:
        (volume,) = read_channels(case.images[name], [case.channels.get(name)])
        if volumes:
            check_grid(case.images[name], volume, case.images[task.modalities[0]], volumes[0])
        volumes.append(volume)
    return volumes[0], np.stack([reversed_axes(volume.data).astype(np.float32) for volume in volumes])


def reversed_axes(data: Array) -> Array:
    """Turn `[x, y, z]` into `[z, y, x]`, and back."""
    return np.ascontiguousarray(data.transpose(2, 1, 0))
