"""nnU-Net's networks, built from the arguments that its plans hold; no name in them is imported."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from timm_ext.errors import InputError, listed, shown

PREFIX = "nnunet."
ARCHITECTURES = ("PlainConvUNet", "ResidualEncoderUNet")
HEADS = ("decoder.seg_layers.*",)
INPUT_LAYERS = {
    "PlainConvUNet": "encoder.stages.0.0.convs.0.conv.weight",
    "ResidualEncoderUNet": "encoder.stem.convs.0.conv.weight",
}

# Arguments that name a class, and the classes of torch.nn that they may name.
_CLASSES = {
    "conv_op": ("Conv1d", "Conv2d", "Conv3d"),
    "norm_op": tuple(f"{kind}Norm{axes}d" for kind in ("Instance", "Batch") for axes in (1, 2, 3)),
    "dropout_op": ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d"),
    "nonlin": ("LeakyReLU", "ReLU", "PReLU", "ELU", "GELU", "SiLU", "Mish"),
}
_BLOCKS = ("BasicBlockD", "BottleneckD")
_NUMBERS = (
    *("n_stages", "features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage", "n_blocks_per_stage"),
    *("n_conv_per_stage_decoder", "conv_bias", "bottleneck_channels", "stem_channels", "nonlin_first"),
)
_SETTINGS = ("norm_op_kwargs", "dropout_op_kwargs", "nonlin_kwargs")
_MISSING = (
    "nnU-Net's networks need dynamic-network-architectures, which nnU-Net installs; without nnU-Net: pip "
    "install 'dynamic-network-architectures<0.4'"
)


def builder(name: str) -> Callable[..., nn.Module]:
    """Return what builds an architecture from `in_channels`, `out_channels` and the options of its plans.

    The network returns the map of the finest grid alone. The heads of coarser grids exist, as nnU-Net's
    files have them; with `deep_supervision` it returns in training the maps of all but the coarsest, which
    counts nothing in nnU-Net's loss, the finest first, else they take no part.
    """

    def build(
        *, in_channels: int, out_channels: int, deep_supervision: bool = False, **options: Any
    ) -> nn.Module:
        arguments = _arguments(name, options)
        try:
            from dynamic_network_architectures.architectures import unet
        except ImportError as error:
            raise InputError(f"network: {name}: {_MISSING}") from error
        architecture: Any = getattr(unet, name)
        network: nn.Module = architecture(
            input_channels=in_channels, num_classes=out_channels, deep_supervision=False, **arguments
        )
        if deep_supervision:
            network.get_submodule("decoder").register_forward_pre_hook(_as_in_training)
            network.register_forward_hook(_without_coarsest)
        return network.apply(architecture.initialize)

    return build


def _as_in_training(decoder: nn.Module, images: object) -> None:
    vars(decoder)["deep_supervision"] = decoder.training


def _without_coarsest(network: nn.Module, images: object, maps: Any) -> Any:
    return maps[: max(len(maps) - 1, 1)] if isinstance(maps, list) else maps


def axes_of(options: Mapping[str, Any]) -> int:
    """Return the number of spatial axes of a network's images."""
    return int(str(options.get("conv_op", "Conv3d"))[-2])


def divisors_of(options: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the numbers by which the edges of an image must be divisible, along each axis.

    Raises:
        InputError: the strides are no whole numbers.
    """
    given = options.get("strides")
    stages = given if isinstance(given, (list, tuple)) else ()
    strides: list[Sequence[int]] = [s if isinstance(s, (list, tuple)) else [s] for s in stages]
    if not strides or not all(s and all(type(step) is int and step > 0 for step in s) for s in strides):
        raise InputError(f"network: strides: expected whole numbers for each stage (got {shown(given)})")
    axes = axes_of(options)
    return tuple(math.prod(s[axis % len(s)] for s in strides) for axis in range(axes))


def _arguments(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of an architecture, its names of classes replaced by the classes."""
    known = (*_NUMBERS, *_SETTINGS, *_CLASSES, "block")
    if unknown := sorted(options.keys() - set(known)):
        raise InputError(f"network: {name}: expected options out of {listed(known)} (got {listed(unknown)})")
    arguments = dict(options)
    for argument, allowed in _CLASSES.items():
        if (given := options.get(argument)) is not None:
            arguments[argument] = _class_named(given, allowed, f"network: {name}: {argument}")
    if (block := options.get("block")) is not None:
        arguments["block"] = _block_named(block, name)
    return arguments


def _class_named(given: Any, allowed: tuple[str, ...], where: str) -> Any:
    """Return a class of torch.nn by its last name, whatever module its path goes through."""
    last = str(given).rpartition(".")[2]
    if last not in allowed or not (given == last or str(given).startswith("torch.nn.")):
        wanted = ", ".join(f"torch.nn.{one}" for one in allowed)
        raise InputError(f"{where}: expected one of {wanted} (got {shown(given)})")
    return getattr(nn, last)


def _block_named(given: Any, name: str) -> Any:
    last = str(given).rpartition(".")[2]
    if last not in _BLOCKS:
        raise InputError(f"network: {name}: block: expected {' or '.join(_BLOCKS)} (got {shown(given)})")
    from dynamic_network_architectures.building_blocks import residual

    return getattr(residual, last)
