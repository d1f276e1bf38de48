"""What commands decide from data, network and machine: told in a few lines, noted in the settings."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm_ext.cli.common import fit_volumes, noted_settings, say_once, settings_from
from timm_ext.cli.reckoned import check_training_memory, edges
from timm_ext.errors import InputError, listed, shown
from timm_ext.system.locks import is_first_of_launched
from timm_ext.system.terminal import duration, say

if TYPE_CHECKING:
    from torch import nn

    from timm_ext.checkpoint import Checkpoint
    from timm_ext.config import RunSettings
    from timm_ext.data.formats.cases import Case
    from timm_ext.data.prepare import Prepared
    from timm_ext.data.tasks import Task
    from timm_ext.interop.nnunet.images import Images
    from timm_ext.planning import Choice, TrainingConfiguration

    Parts = tuple[list[Prepared], list[Prepared]]

SETTINGS_NAME = "settings.yaml"
_PER_TRAINING = ("train.steps", "train.batch_size", "train.validate_every", "train.patch")


def network_of_task(settings: "RunSettings", task: "Task") -> dict[str, Any]:
    """Return the `network_config` of the settings for a task; options that are not given stay open.

    Raises:
        InputError: the network cannot be built.
    """
    from timm_ext.planning import footprint_of

    network = {
        "name": settings.network.name,
        "in_channels": len(task.modalities),
        "out_channels": len(task.output_names),
        "options": settings.network.options,
    }
    footprint_of(network)
    return network


def fit_whole_volumes(settings: "RunSettings", network: Mapping[str, Any]) -> "RunSettings":
    """Where whole volumes are trained on, prepare them with edges that the network takes."""
    from timm_ext.planning import footprint_of

    if "train.patch" in settings.automatic or settings.train.patch is not None:
        return settings
    return fit_volumes(settings, footprint_of(network).divisor)


def settings_of_network(
    config: Path | None,
    overrides: Sequence[str] | None,
    checkpoint: "Checkpoint",
    network: Mapping[str, Any],
    images: "Images | None" = None,
) -> "RunSettings":
    """Read the settings of a command that applies a network, with what its file notes and what it is."""
    settings = with_network(settings_from(config, overrides, checkpoint), network, checkpoint.path)
    if images is not None:
        return with_images(settings, images)
    return without_noted_spacing(with_noted_window(settings, checkpoint), checkpoint.path)


def with_network(settings: "RunSettings", network: Mapping[str, Any], where: object) -> "RunSettings":
    """Note the network that is there; what the settings say about it must be true of it.

    Args:
        settings: of the command.
        network: `network_config`.
        where: the file it is from, for the message.

    Raises:
        InputError: the settings name another network, or other options.
    """
    from timm_ext.config import NetworkSettings

    given, options = settings.network, dict(network["options"])
    if given.name not in (network["name"], NetworkSettings().name):
        raise InputError(f"network.name: expected {network['name']}, as in {where} (got {given.name})")
    for name, value in given.options.items():
        if options.get(name) != value:
            raise InputError(
                f"network.options: expected {name} {shown(options.get(name))}, as in {where} (got "
                f"{shown(value)})"
            )
    return settings.model_copy(update={"network": NetworkSettings(name=network["name"], options=options)})


def with_images(settings: "RunSettings", images: "Images") -> "RunSettings":
    """Take patches of the size in another program's plans, which also say how images are prepared.

    Raises:
        InputError: the settings say how, or want whole volumes, of any size as they are.
    """
    from timm_ext.data.preprocess import PrepareSettings

    if settings.prepare != PrepareSettings():
        raise InputError(
            f"prepare: expected no settings of it for a network of nnU-Net, whose plans say how images are "
            f"prepared (got others than the defaults, for {images.where})"
        )
    settings = settings.planned(
        {"prepare.spacing": None, **dict.fromkeys(("train.patch", "fisher.patch"), images.patch)}
    )
    for section in ("train", "fisher"):
        if getattr(settings, section).patch is None:
            raise InputError(
                f"{section}.patch: expected auto, the patch of nnU-Net's plans, or three edges (got whole)"
            )
    return settings


def with_noted_window(settings: "RunSettings", checkpoint: "Checkpoint") -> "RunSettings":
    """Apply a network in windows of the patches it was trained on, unless the user says otherwise."""
    window = noted_settings(checkpoint).predict.window
    return settings.planned({"predict.window": window, "fisher.patch": window})


def with_spacing(settings: "RunSettings", cases: "Sequence[Case]") -> "RunSettings":
    """Make the voxel size concrete: planned, or where the scans' own is wanted and all have one, that one."""
    from timm_ext.planning import target_spacing

    planned = "prepare.spacing" in settings.automatic
    if not planned and settings.prepare.spacing is not None:
        return settings
    target = target_spacing(cases)
    if target is None:
        return settings.planned({"prepare.spacing": None})
    if planned:
        of_all = f"the median; {target.resampled} of {target.cases} cases are resampled"
        say_once(
            f"Voxels of {_lengths(target.spacing)} mm, {of_all if target.resampled else 'those of all cases'}"
        )
        return settings.planned({"prepare.spacing": target.spacing})
    if target.resampled:
        say_once("Voxel sizes differ and are kept: the network will take any scan at its own")
        return settings
    prepare = replace(settings.prepare, spacing=target.spacing)
    return settings.model_copy(update={"prepare": prepare})


def without_noted_spacing(settings: "RunSettings", where: object) -> "RunSettings":
    """Take scans at their own voxel size where a network's file notes none, and say so."""
    if "prepare.spacing" in settings.automatic:
        say_once(
            f"{where} notes no voxel size: scans are taken at their own; --set prepare.spacing=S resamples "
            "them to the one it was trained at"
        )
    return settings.planned({"prepare.spacing": None})


def tell_far_scans(settings: "RunSettings", scans: "Sequence[Case]") -> None:
    """Say which scans have voxels of quite another size than those that the network was trained on."""
    from timm_ext.data.examine import unlike
    from timm_ext.planning import case_spacing

    wanted = settings.prepare.spacing
    if wanted is None:
        return
    three = wanted if isinstance(wanted, tuple) else (wanted,) * 3
    far = []
    for scan in scans:
        own = case_spacing(scan)
        if own and unlike(own, three):
            far.append(f"{scan.id} {_lengths(own)} mm")
    if far:
        say_once(
            f"Voxels of another size than the network was trained on are resampled to {_lengths(wanted)} mm: "
            f"{listed(far)}"
        )


def with_configuration(
    settings: "RunSettings",
    network: Mapping[str, Any],
    parts: "Parts",
    *,
    fixed: bool,
    share: float = 1.0,
) -> "tuple[RunSettings, TrainingConfiguration]":
    """Plan a training, and note in the settings what the user has left open.

    Args:
        settings: of the command.
        network: `network_config`.
        parts: prepared training and validation cases.
        fixed: the network exists and keeps its depth.
        share: of the steps of a training that this one takes.

    Raises:
        InputError: no training case; a patch that the network does not take, or more memory than there is.
    """
    from timm_ext.config import NetworkSettings
    from timm_ext.planning import configure_training, this_machine

    if not parts[0]:
        raise InputError("training: expected at least one case (got none)")
    machine = this_machine(settings.train.accelerator, settings.train.devices)
    train, val = ([case.shape for case in part] for part in parts)
    choice = _choice(settings, network, fixed, share)
    configuration = configure_training(train, val, _median_spacing(parts), machine, choice)
    settings = settings.planned(
        {
            "train.patch": configuration.patch,
            "train.batch_size": configuration.batch_size,
            "train.steps": configuration.steps,
            "train.validate_every": configuration.validate_every,
        }
    )
    settings = settings.planned(
        {"predict.window": settings.train.patch, "fisher.patch": settings.train.patch}
    )
    options = configuration.network["options"]
    settings = settings.model_copy(
        update={"network": NetworkSettings(name=network["name"], options=dict(options))}
    )
    check_training_memory(configuration, parts, machine, network["in_channels"])
    return settings, configuration


def tell_configuration(
    settings: "RunSettings", configuration: "TrainingConfiguration", parts: "Parts", model: "nn.Module"
) -> None:
    """Print a configuration: what is trained on, how long, and what it takes."""
    import numpy as np
    import torch

    from timm_ext.planning import step_seconds, this_machine
    from timm_ext.system.machine import size_told

    train, count = settings.train, len(parts[0])
    machine = this_machine(train.accelerator, train.devices)
    if not is_first_of_launched():
        return
    shape = np.median([case.shape for part in parts for case in part], axis=0).astype(int)
    examples = "whole volumes"
    if train.patch is not None:
        examples = f"patches of {edges(train.patch)} voxels, half of them on a region"
    depth = configuration.network["options"].get("levels")
    every, steps = train.round_steps(count), train.total_steps(count)
    lines = [
        f"Planned for {count} training and {len(parts[1])} validation cases of {edges(shape)} voxels"
        f" (median), on a {machine.kind.upper()}:",
        f"a step takes {train.batch_size} {examples}; {configuration.network['name']}"
        + (f" with {depth} levels" if depth else ""),
        f"at most {steps} steps, " + (f"validation every {every}" if parts[1] else "no validation"),
    ]
    taken = f"about {size_told(configuration.step_bytes)}"
    if machine.devices == 1:
        device = torch.device("cuda" if machine.kind == "gpu" else "cpu")
        batch = (configuration.batch_size, configuration.network["in_channels"], *configuration.size)
        divisor, fast = configuration.footprint.divisor, train.fast_layers
        seconds = step_seconds(model, batch, device, divisor, train.precision, fast_layers=fast)
        validation = configuration.validation_in_steps * ceil(steps / every)
        taken += f", {seconds:.2g} s a step, {duration(seconds * (steps + validation))} in all"
    lines.append(f"{taken}; --set train.FIELD=… changes it, --resume goes on")
    say("\n  ".join(lines), lines=True)


def _choice(settings: "RunSettings", network: Mapping[str, Any], fixed: bool, share: float) -> "Choice":
    """Return what the user has decided already."""
    from timm_ext.planning import Choice

    auto, train = settings.automatic, settings.train
    given = {name.partition(".")[2]: name not in auto for name in _PER_TRAINING}
    return Choice(
        network=network,
        fixed=fixed,
        patch=train.patch if given["patch"] else None,
        whole=given["patch"] and train.patch is None,
        batch_size=train.batch_size if given["batch_size"] else None,
        steps=train.steps if given["steps"] else None,
        share=share,
    )


def _median_spacing(parts: "Parts") -> tuple[float, float, float]:
    import numpy as np

    from timm_ext.data.volume import spacing_of

    first, second, third = np.median(
        [spacing_of(case.affine) for part in parts for case in part], axis=0
    ).tolist()
    return first, second, third


def _lengths(spacing: float | tuple[float, float, float]) -> str:
    values = spacing if isinstance(spacing, tuple) else (spacing,)
    told = [f"{value:.4g}" for value in values]
    return told[0] if len(set(told)) == 1 else " × ".join(told)
