"""What nnU-Net's plans say of a network; nothing in them is imported or evaluated."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from timm_ext.errors import InputError, listed, shown
from timm_ext.networks.nnunet import ARCHITECTURES, PREFIX

FIRST_VERSION = (
    "nnU-Net v1 wrote it: convert the data set by nnUNetv2_convert_old_nnUNet_dataset and train with v2, "
    "whose networks are others"
)
"""What to do with what nnU-Net v1 wrote."""


@dataclass(frozen=True)
class Configuration:
    """A configuration of the plans, what it inherits included.

    Attributes:
        name: `3d_fullres`, `2d`, ….
        network: name of the architecture, as `build_network` takes it.
        options: of the architecture, JSON values.
        patch: edges in voxels that it is trained on, in nnU-Net's order of axes.
        cascade: it also reads the segmentation of a coarser configuration.
        values: all its entries.
    """

    name: str
    network: str
    options: Mapping[str, Any]
    patch: tuple[int, ...]
    cascade: bool
    values: Mapping[str, Any]


def configuration_of(plans: Any, name: str, where: object) -> Configuration:
    """Read a configuration.

    Args:
        plans: content of a `plans.json`.
        name: of the configuration.
        where: the file, for messages.

    Raises:
        InputError: plans of another version or form, no such configuration, or an architecture that is not
            one of nnU-Net's own.
    """
    configurations = plans.get("configurations") if isinstance(plans, Mapping) else None
    if not isinstance(configurations, Mapping):
        if isinstance(plans, Mapping) and "plans_per_stage" in plans:
            raise InputError(f"{where}: expected plans of nnU-Net v2 (got those of v1); {FIRST_VERSION}")
        raise InputError(f"{where}: expected plans of nnU-Net v2 with configurations (got none)")
    values = entries_of(configurations, name, where)
    network, options = _architecture(values, f"{where}: {name}")
    patch = values.get("patch_size")
    if not isinstance(patch, list) or not patch or not all(type(edge) is int and edge > 0 for edge in patch):
        raise InputError(f"{where}: {name}: patch_size: expected edges in voxels (got {shown(patch)})")
    cascade = values.get("previous_stage") is not None
    return Configuration(name, network, options, tuple(patch), cascade, values)


def entries_of(configurations: Mapping[str, Any], name: Any, where: object) -> dict[str, Any]:
    """Return a configuration's entries over those that it inherits."""
    found: dict[str, Mapping[str, Any]] = {}
    while name is not None:
        values = configurations.get(name) if isinstance(name, str) else None
        if not isinstance(values, Mapping):
            raise InputError(
                f"{where}: expected a configuration out of {listed(configurations)} (got {shown(repr(name))})"
            )
        if name in found:
            raise InputError(f"{where}: inherits_from: expected no circle (got {' from '.join(found)})")
        found[name] = values
        name = values.get("inherits_from")
    return {key: value for values in reversed(found.values()) for key, value in values.items()}


def _architecture(values: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the options of the network."""
    described = values.get("architecture")
    if described is None:
        return _old_architecture(values, where)
    path = described.get("network_class_name") if isinstance(described, Mapping) else None
    options = described.get("arch_kwargs") if isinstance(described, Mapping) else None
    last = str(path).rpartition(".")[2]
    if last not in ARCHITECTURES or not isinstance(options, Mapping):
        raise InputError(
            f"{where}: architecture: expected {' or '.join(ARCHITECTURES)} with arch_kwargs "
            f"(got {shown(path)})"
        )
    return PREFIX + last, {key: value for key, value in options.items() if key != "deep_supervision"}


def _old_architecture(values: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """Return those that plans from before nnU-Net 2.4 say in entries of their own."""
    name = values.get("UNet_class_name")
    wanted = {
        *("n_conv_per_stage_encoder", "n_conv_per_stage_decoder", "conv_kernel_sizes", "patch_size"),
        *("pool_op_kernel_sizes", "UNet_base_num_features", "unet_max_num_features"),
    }
    if name not in ARCHITECTURES or not wanted <= values.keys():
        missing = sorted(wanted - values.keys())
        got = f"no {listed(missing)}" if name in ARCHITECTURES else f"UNet_class_name {shown(name)}"
        raise InputError(f"{where}: expected an architecture, {' or '.join(ARCHITECTURES)} (got {got})")
    patch, blocks = values["patch_size"], values["n_conv_per_stage_encoder"]
    base, most = values["UNet_base_num_features"], values["unet_max_num_features"]
    if not (isinstance(patch, list) and isinstance(blocks, list) and type(base) is type(most) is int):
        raise InputError(
            f"{where}: expected lists patch_size and n_conv_per_stage_encoder and whole numbers of features "
            f"(got {shown(patch)}, {shown(blocks)}, {shown(base)} and {shown(most)})"
        )
    axes = len(patch)
    return f"{PREFIX}{name}", {
        "n_stages": len(blocks),
        "features_per_stage": [min(base * 2**stage, most) for stage in range(len(blocks))],
        "conv_op": f"torch.nn.Conv{axes}d",
        "kernel_sizes": values["conv_kernel_sizes"],
        "strides": values["pool_op_kernel_sizes"],
        "n_conv_per_stage" if name == "PlainConvUNet" else "n_blocks_per_stage": blocks,
        "n_conv_per_stage_decoder": values["n_conv_per_stage_decoder"],
        "conv_bias": True,
        "norm_op": f"torch.nn.InstanceNorm{axes}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
