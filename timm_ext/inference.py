"""From a trained network and a scan to probabilities and a label file on the scan's own grid."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, combinations
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from timm_ext.data.formats.cases import Case
from timm_ext.data.grid import Triple
from timm_ext.data.prepare import Prepared, PrepareSettings, prepare_case, restore
from timm_ext.data.tasks import Labels, Task
from timm_ext.data.volume import Volume, write_nifti
from timm_ext.documents.fields import Edges, Flag, Share, number, refused_as, whole
from timm_ext.errors import InputError
from timm_ext.layers import layers_on, memory_on
from timm_ext.modes import evaluating
from timm_ext.networks.registry import size_divisor_of

Axis = Annotated[int, whole(0, 2)]


@refused_as("prediction")
@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PredictSettings:
    """How a network is applied to a whole scan.

    Attributes:
        window: edges D, H, W of the sliding window in voxels, rounded up to what the network takes; None
            takes the whole volume at once.
        overlap: share of a window that its neighbour covers.
        flips: axes (0 left–right, 1 front–back, 2 up–down in RAS) along which mirror images are averaged, in
            all combinations. Only those that training mirrored: a network that has learned where a structure
            lies loses it otherwise.
        threshold: probability above which a voxel belongs to a region.
        fast_layers: predict on a CPU by `timm_ext.fast_layers`; elsewhere without effect.
    """

    window: Edges | None = None
    overlap: Share = 0.5
    flips: Annotated[tuple[Axis, ...], Field(max_length=3)] = ()
    threshold: Annotated[float, number(0, above=True, below=1)] = 0.5
    fast_layers: Flag = True


def predict_logits(
    model: nn.Module, images: Tensor, settings: PredictSettings | None = None, *, batch_size: int = 4
) -> Tensor:
    """Apply a network to whole volumes of any size; gradients and modes are left to the caller.

    Without a window the volumes are zero-padded at their far ends to a size that the network takes, and the
    logits are cut back. With one, overlapping windows are weighted by a Gaussian that falls off from their
    centre (MONAI).

    Args:
        model: from `[B, C, D, H, W]` to logits `[B, R, D, H, W]`.
        images: `[B, C, D, H, W]`.
        settings: window and overlap.
        batch_size: windows per pass.

    Returns:
        Logits `[B, R, D, H, W]`.

    Raises:
        InputError: the network returns something else than one map.
    """
    settings, divisor = settings or PredictSettings(), size_divisor_of(model)
    if settings.window is None:
        edges = images.shape[2:]
        ends = zip(edges[::-1], fitting_size(edges, divisor)[::-1], strict=True)
        padding = [length for edge, full in ends for length in (0, full - edge)]
        depth, height, width = edges
        padded = nn.functional.pad(images, padding)
        with layers_on(images.device, settings.fast_layers):
            logits = _checked(model(padded))
        return logits[:, :, :depth, :height, :width]
    from monai.inferers.utils import sliding_window_inference  # slow to load

    def of_windows(part: Tensor) -> Tensor:
        with layers_on(part.device, settings.fast_layers):
            return _checked(model(part))

    with memory_on(images.device, settings.fast_layers):
        result = sliding_window_inference(
            images,
            roi_size=fitting_size(settings.window, divisor),
            sw_batch_size=batch_size,
            predictor=of_windows,
            overlap=settings.overlap,
            mode="gaussian",
        )
    assert isinstance(result, Tensor)
    return result


def predict_probabilities(
    model: nn.Module,
    image: Tensor,
    settings: PredictSettings | None = None,
    *,
    softmax: bool = False,
    batch_size: int = 4,
) -> Tensor:
    """Predict the probability of every output in every voxel.

    σ(logits), or its mean over mirror images; with `softmax` that of the mean of the logits, as nnU-Net does.

    Args:
        model: from `[B, C, D, H, W]` to logits `[B, R, D, H, W]`; evaluated without dropout where it is,
            each module's own mode is restored.
        image: `[C, D, H, W]`.
        settings: window, overlap and flips.
        softmax: the outputs are classes that exclude each other.
        batch_size: volumes or windows per pass. PyTorch's CPU convolutions are slow for a batch of one
            small volume, so that mirror images and windows cost less together.

    Returns:
        `[R, D, H, W]` float32 on the CPU.

    Raises:
        InputError: the image is not `[C, D, H, W]`, or as for `predict_logits`.
    """
    if image.ndim != 4:
        raise InputError(f"prediction: expected an image [C, D, H, W] (got shape {list(image.shape)})")
    settings = settings or PredictSettings()
    spatial = sorted({axis + 2 for axis in settings.flips})
    axes = list(chain.from_iterable(combinations(spatial, n) for n in range(len(spatial) + 1)))
    per_pass = batch_size if settings.window is None else 1
    parameter = next(model.parameters(), image)
    total: Tensor | float = 0.0
    kept = memory_on(parameter.device, settings.fast_layers)
    with torch.inference_mode(), evaluating(model), kept:
        batch = image.to(parameter.device)[None]
        for start in range(0, len(axes), per_pass):
            chosen = axes[start : start + per_pass]
            mirrored = torch.cat([batch.flip(each) for each in chosen])
            logits = predict_logits(model, mirrored, settings, batch_size=batch_size)
            values = logits.float() if softmax else logits.float().sigmoid()
            for each, one in zip(chosen, values.split(1), strict=True):
                total = total + one.flip(each)
    assert isinstance(total, Tensor)
    mean = (total[0] / len(axes)).cpu()
    return mean.softmax(0) if softmax else mean


def labels_from_probabilities(
    probabilities: Tensor | npt.NDArray[np.floating], task: Task, threshold: float = 0.5
) -> Labels:
    """Turn regions into one label map.

    Classes of a softmax: the likeliest, the background among them; the threshold plays no part.
    Disjoint regions (parcellation): the likeliest region of those above the threshold, the first of equals.
    Nested ones (BraTS): regions above the threshold are painted from the outermost inward, whole tumour → 2,
    tumour core → 1, enhancing tumour → 4, so that the inner region wins.

    Args:
        probabilities: `[R, D, H, W]`, the task's outputs in their order.
        task: names the regions' labels; a region of several labels is written as its first own one.
        threshold: probability above which a voxel belongs to a region.

    Returns:
        `[D, H, W]` uint8, 0 where no region is above the threshold.

    Raises:
        InputError: another number of regions, or a threshold outside (0, 1).
    """
    values = np.asarray(probabilities)
    if values.ndim != 4 or len(values) != len(task.output_names):
        raise InputError(
            f"labels: expected probabilities [{len(task.output_names)}, D, H, W] for task {task.name} "
            f"(got {list(values.shape)})"
        )
    if not 0 < threshold < 1:
        raise InputError(f"threshold: must lie in (0, 1) (got {threshold})")
    if task.softmax:
        written = np.array([0, *(region.labels[0] for region in task.regions)], dtype=np.uint8)
        likeliest: Labels = written[values.argmax(axis=0)]
        return likeliest
    labels = np.zeros(values.shape[1:], dtype=np.uint8)
    if task.disjoint and not task.class_order:
        own = np.array([region.labels[0] for region in task.regions], dtype=np.uint8)
        above = values.max(axis=0) > threshold
        labels[above] = own[values.argmax(axis=0)][above]
        return labels
    for index, label in task.paint_order():
        labels[values[index] > threshold] = label
    return labels


def predict_case(
    model: nn.Module,
    case: Case,
    task: Task,
    prepare: PrepareSettings,
    out_path: Path | str,
    settings: PredictSettings | None = None,
    *,
    probabilities_path: Path | str | None = None,
    check: Callable[[Prepared], None] | None = None,
) -> Labels:
    """Segment a case and write the label map on the grid of its own files: same shape, same affine.

    Probabilities, not labels, are brought back to the input's grid, so that borders are not staircases of
    the coarser working grid.

    Args:
        model: the network of the task.
        case: the input files; a label file is not needed and not read.
        task: names the modalities and the regions.
        prepare: the preparation that the network was trained with.
        out_path: the label map, `.nii` or `.nii.gz`.
        settings: of the prediction.
        probabilities_path: also write `[R, D, H, W]` float32 here, outputs as NIfTI's fourth axis.
        check: called with the prepared case before the network sees it, to refuse what memory does not hold.

    Returns:
        The label map `[D, H, W]` as written.

    Raises:
        InputError: the case cannot be prepared, does not fit the network, or the result cannot be written.
    """
    settings = settings or PredictSettings()
    prepared = prepare_case(replace(case, label=None), task, prepare, None)
    if check is not None:
        check(prepared)
    probabilities = predict_probabilities(
        model, torch.from_numpy(np.array(prepared.image)), settings, softmax=task.softmax
    )
    restored = restore(probabilities.numpy(), prepared)
    labels = labels_from_probabilities(restored, task, settings.threshold)
    source = case.images[task.modalities[0]]
    affine = prepared.grid.input_affine
    if probabilities_path is not None:
        write_nifti(probabilities_path, Volume(restored, affine), like=source)
    write_nifti(out_path, Volume(labels, affine), like=source)
    return labels


def fitting_size(size: Sequence[int], divisor: int) -> Triple:
    """Round edges up to a network's divisor, one edge further where the coarsest grid would be one voxel."""
    depth, height, width = (math.ceil(edge / divisor) * divisor for edge in size)
    if divisor > 1 and depth == height == width == divisor:
        width *= 2
    return depth, height, width


def _checked(logits: object) -> Tensor:
    if not isinstance(logits, Tensor) or logits.ndim != 5:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"network: expected one map of logits [B, R, D, H, W] (got {got})")
    return logits
