"""Checkpoints of Auto3DSeg, `{"state_dict": …, "config": …}`, which describe themselves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm_ext.errors import listed
from timm_ext.interop.monai.config import network_of
from timm_ext.interop.monai.labels import task_of_channels
from timm_ext.interop.monai.preparation import settings_of

_ENTRY = "network"
_OVERLAP = 0.625  # of its windows
_KEPT = {"min": 0.75, "max": 1.25}  # voxels of so many times the wanted size are not resampled
_SCORES = ("meanstd", "mri")  # names of z-scores of what is not 0


def is_checkpoint(beside: Mapping[str, Any]) -> bool:
    """Tell whether what lies beside the tensors of a file is a config of Auto3DSeg."""
    config = beside.get("config")
    return isinstance(config, Mapping) and isinstance(config.get(_ENTRY), Mapping)


def described(
    beside: Mapping[str, Any], path: Path
) -> tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any], list[str]]:
    """Return the network, the task where the config names one, settings, and in words what was left out.

    The settings, by section, prepare images as the config says, see `settings_of`.

    Raises:
        InputError: as for `network_of`.
    """
    config = beside["config"]
    network, notes = network_of(config, _ENTRY, f"{path}: config")
    extra = config.get("extra_modalities")
    images = [config.get("modality"), *(extra if isinstance(extra, Mapping) else ())]
    inputs = [name.upper() for name in images if isinstance(name, str)]
    classes = config.get("class_names")
    outputs = [_name(one) for one in classes] if isinstance(classes, list) else []
    if not config.get("sigmoid") and network["out_channels"] > 1:
        gone = 1 if len(outputs) == network["out_channels"] else 0
        outputs = ["background", *outputs[gone:]]
    labels = config.get("class_index")
    task, missing = task_of_channels(inputs, outputs, network, "auto3dseg", "config", labels)
    modalities = task["modalities"] if task else ()
    inferer = {
        "_target_": "SlidingWindowInfererAdapt",
        "roi_size": config.get("roi_size"),
        "overlap": _OVERLAP,
        "mode": "gaussian",
    }
    parts = (_transforms(config), inferer)
    changed = _not_of_monai(config)
    settings, unlike = settings_of(config, parts, modalities, network["in_channels"], "config", changed)
    return network, task, settings, [*notes, *([missing] if missing else []), *unlike]


def _transforms(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the transforms of MONAI that Auto3DSeg's SegResNet makes of a config."""
    every: list[dict[str, Any]] = []
    if config.get("orientation_ras"):
        every.append({"_target_": "Orientationd", "axcodes": "RAS"})
    if config.get("crop_foreground") and not config.get("extra_modalities"):
        every.append({"_target_": "CropForegroundd", "margin": 10, "allow_smaller": True})
    if config.get("resample"):
        pixdim = config.get("resample_resolution")
        limits = {f"{name}_pixdim": _times(pixdim, factor) for name, factor in _KEPT.items()}
        every.append({"_target_": "Spacingd", "pixdim": pixdim, **limits})
    if all(mode in _SCORES for mode in _modes(config)):
        every.append({"_target_": "NormalizeIntensityd", "nonzero": True, "channel_wise": True})
    return [{**step, "keys": "image"} for step in every]


def _times(lengths: Any, factor: float) -> Any:
    every = lengths if isinstance(lengths, list) else [lengths]
    return [factor * one if isinstance(one, (int, float)) else one for one in every]


def _modes(config: Mapping[str, Any]) -> list[Any]:
    """Return how intensities of each modality are normalised."""
    extra = config.get("extra_modalities")
    return [config.get("normalize_mode"), *(extra.values() if isinstance(extra, Mapping) else ())]


def _not_of_monai(config: Mapping[str, Any]) -> list[str]:
    """Name what changes intensities and is no transform of MONAI alone."""
    modes = _modes(config)
    own = [] if all(mode in _SCORES for mode in modes) else [f"normalize_mode {listed(map(str, modes))}"]
    return [*own, *(["custom_transforms"] if config.get("custom_transforms") else [])]


def _name(one: Any) -> str:
    return str(one.get("name", one)) if isinstance(one, Mapping) else str(one)
