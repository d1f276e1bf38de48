"""What nnU-Net's plans say of a network's images, side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from timm_ext.interop.nnunet.plans import entries_of
from timm_ext.interop.nnunet.preparation import PROPERTIES, measured_in
from timm_ext.vocabulary.modalities import modality_key

_ENTRIES = {
    "spacing": "spacing",
    "patch_size": "patch",
    "resampling_fn_data_kwargs": "resampling of images",
    "resampling_fn_seg_kwargs": "resampling of labels",
}


def unlike(own: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Say in what two descriptions of images differ, as far as both speak of it."""
    return [
        f"{what} {other[what]}, here {value}"
        for what, value in own.items()
        if what in other and other[what] != value
    ]


def images_said(plans: Any, configuration: str, modalities: Sequence[str], where: object) -> dict[str, str]:
    """Return what plans say of images, in words: spacing, patch, axes, resampling, normalisation by modality.

    Raises:
        InputError: there is no such configuration.
    """
    values = entries_of(plans["configurations"], configuration, where)
    said = {what: _told(values[entry]) for entry, what in _ENTRIES.items() if entry in values}
    if "transpose_forward" in plans:
        said["order of axes"] = _told(plans["transpose_forward"])
    schemes, masked = (values.get(name) for name in ("normalization_schemes", "use_mask_for_norm"))
    if isinstance(schemes, list) and isinstance(masked, list):
        for number, (name, scheme, mask) in enumerate(zip(modalities, schemes, masked, strict=False)):
            within = " within the foreground" if mask and scheme == "ZScoreNormalization" else ""
            measured = measured_in(plans, number) if scheme == "CTNormalization" else {}
            by = "".join(
                f" {key} {measured[key]:.4g}" for key in PROPERTIES if isinstance(measured.get(key), float)
            )
            said[f"normalisation of {modality_key(name)}"] = f"{scheme}{within}{by}"
    return said


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_told(one)}" for name, one in sorted(value.items()) if name != "is_seg")
    if isinstance(value, (list, tuple)):
        return " × ".join(map(_told, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
