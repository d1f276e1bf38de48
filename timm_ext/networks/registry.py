"""Networks by name: the package's own, MONAI's, and those that users register."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from timm_ext.errors import InputError, first_line, listed, shown
from timm_ext.networks import monai, nnunet
from timm_ext.networks.isensee2017 import Isensee2017
from timm_ext.networks.plugins import load_installed


@dataclass(frozen=True)
class NetworkSpec:
    """How to build a network and which of its parameters depend on the task.

    Attributes:
        name: the name it is saved under.
        build: called with `in_channels`, `out_channels` and the options; returns a module from images
            `[B, C, D, H, W]` to logits `[B, R, D, H, W]`.
        heads: shell patterns on the names of the output layers' parameters. None: the layers whose shapes
            change with `out_channels`, found by building the network twice without memory.
        input_layers: names of the weights that read the images. None: those whose shapes change with
            `in_channels`.
        defaults: options that are set unless the caller sets them.
        divisor: number by which every edge of an image must be divisible, from the options.
        divisors: those along each axis, where they are not one.
        axes: spatial axes of its images, from the options.
        depth: the option that says on how many grids it works, each half as fine as the one before; None for
            a network whose depth is not one number.
        supervised: with `deep_supervision` it returns the maps of coarser heads in training alone; others
            are refused with that option.
    """

    name: str
    build: Callable[..., nn.Module]
    heads: tuple[str, ...] | None = None
    input_layers: tuple[str, ...] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    divisor: Callable[[Mapping[str, Any]], int] = lambda options: monai.UNKNOWN_DIVISOR
    divisors: Callable[[Mapping[str, Any]], tuple[int, ...]] | None = None
    axes: Callable[[Mapping[str, Any]], int] = lambda options: int(options.get("spatial_dims", 3))
    depth: str | None = None
    supervised: bool = False


_SPECS: dict[str, NetworkSpec] = {
    "isensee2017": NetworkSpec(
        name="isensee2017",
        build=Isensee2017,
        heads=("heads.*",),
        input_layers=("encoder.0.entry.conv.weight",),
        defaults={"base_filters": 16, "levels": 5, "dropout": 0.3, "negative_slope": 0.01},
        divisor=lambda options: 2 ** (options["levels"] - 1),
        depth="levels",
    ),
    **{
        f"{nnunet.PREFIX}{name}": NetworkSpec(
            name=f"{nnunet.PREFIX}{name}",
            build=nnunet.builder(name),
            heads=nnunet.HEADS,
            input_layers=(nnunet.INPUT_LAYERS[name],),
            divisor=lambda options: max(nnunet.divisors_of(options)),
            divisors=nnunet.divisors_of,
            axes=nnunet.axes_of,
            supervised=True,
        )
        for name in nnunet.ARCHITECTURES
    },
}


def register_network(spec: NetworkSpec) -> None:
    """Make a network known under `spec.name`, so that it can be built, saved and loaded by name.

    Raises:
        InputError: the name is taken.
    """
    if spec.name in _SPECS or spec.name.startswith(monai.PREFIX):
        raise InputError(f"network: the name {spec.name!r} is taken")
    _SPECS[spec.name] = spec


def network_names() -> tuple[str, ...]:
    """Return the names `build_network` takes; any other network of `monai.networks.nets` works as well."""
    load_installed()
    return (*_SPECS, *(f"{monai.PREFIX}{name}" for name in monai.OPTIONS))


def network_spec(name: str) -> NetworkSpec:
    """Look a network up by name.

    Args:
        name: one of `network_names()`, or `monai.` and the name of a class of `monai.networks.nets`.

    Raises:
        InputError: there is no such network.
    """
    if name not in _SPECS and not name.startswith(monai.PREFIX):
        load_installed()
    if name in _SPECS:
        return _SPECS[name]
    if name.startswith(monai.PREFIX) and (kind := monai.network_class(name.removeprefix(monai.PREFIX))):
        short = kind.__name__  # MONAI spells some of them in several ways
        options, divisor = monai.OPTIONS.get(short, ({}, lambda options: monai.UNKNOWN_DIVISOR))
        return NetworkSpec(
            name=f"{monai.PREFIX}{short}",
            build=kind,
            defaults=options,
            divisor=divisor,
            supervised=short in monai.SUPERVISED,
        )
    raise InputError(
        f"network: expected one of {listed(network_names())} or monai.<class of monai.networks.nets> "
        f"(got {name!r}); one of your own is registered by the module that --plugin MODULE imports"
    )


def build_network(
    name: str, *, in_channels: int, out_channels: int, seed: int | None = None, **options: Any
) -> nn.Module:
    """Build a network by name and note on it how it was built.

    Args:
        name: see `network_names`.
        in_channels: input images C.
        out_channels: output regions R.
        seed: makes the initial weights a function of this number alone and leaves the global generator
            untouched; None draws from the global generator.
        **options: the network's own options; they must be JSON values for the network to be saved.

    Returns:
        A module from `[B, C, D, H, W]` to logits `[B, R, D, H, W]`, with `network_config` (a dict that
        rebuilds it) and `size_divisor` (every edge of an image must be divisible by it).

    Raises:
        InputError: no such network, or options it does not take.
    """
    spec = network_spec(name)
    config: dict[str, Any] = {
        "name": spec.name,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "options": {**spec.defaults, **options},
    }
    if config["options"].get("deep_supervision") and not spec.supervised:
        raise InputError(
            f"network: {name} with deep_supervision returns several maps; expected one map of logits"
        )
    if seed is None:
        model = _construct(spec, config)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _construct(spec, config)
    vars(model)["network_config"] = config
    vars(model)["size_divisor"] = spec.divisor(config["options"])
    return model


def config_of(model: nn.Module) -> dict[str, Any]:
    """Return the `network_config` that `build_network` left on a model.

    Raises:
        InputError: the model was not built by `build_network`.
    """
    config = getattr(model, "network_config", None)
    if not isinstance(config, dict):
        raise InputError(
            f"network: expected a model made by build_network (got {type(model).__name__} without "
            "network_config)"
        )
    return config


def heads_of(model: nn.Module) -> tuple[str, ...]:
    """Return shell patterns for the parameters of a model's output layers.

    Raises:
        InputError: the model was not built by `build_network`, or no layer depends on the output channels.
    """
    config = config_of(model)
    heads = network_spec(config["name"]).heads
    if heads is not None:
        return heads
    layers = (name.rpartition(".")[0] for name in _dependent_on("out_channels", json.dumps(config)))
    return tuple(f"{layer}.*" for layer in dict.fromkeys(layers))


def input_layers_of(model: nn.Module) -> tuple[str, ...]:
    """Return the names of all weights that read the images; residual networks have two of them.

    Raises:
        InputError: the model was not built by `build_network`, or no layer depends on the input channels.
    """
    config = config_of(model)
    layers = network_spec(config["name"]).input_layers
    return layers if layers is not None else _dependent_on("in_channels", json.dumps(config))


def input_layer_of(model: nn.Module) -> str:
    """Return the name of the first convolution's weight.

    Raises:
        InputError: as for `input_layers_of`.
    """
    return input_layers_of(model)[0]


def channel_axes_of(model: nn.Module, argument: str) -> dict[str, tuple[int, ...]]:
    """Return the axes of parameters and buffers whose lengths change with the number of channels.

    Args:
        model: made by `build_network`.
        argument: `in_channels` or `out_channels`.

    Returns:
        By name of the tensor; those without such an axis are left out.

    Raises:
        InputError: the model was not built by `build_network`, or the number of its tensors, or of their
            axes, changes with that of the channels.
    """
    changes = _shape_changes(argument, json.dumps(config_of(model)))
    if changes.odd:
        raise InputError(
            f"network: expected the same tensors for any {argument} (got others: {listed(changes.odd)})"
        )
    axes = {
        name: tuple(axis for axis, pair in enumerate(zip(*shapes, strict=True)) if pair[0] != pair[1])
        for name, shapes in changes.tensors.items()
    }
    return {name: changed for name, changed in axes.items() if changed}


def counted_channels(
    config: Mapping[str, Any], argument: str, shapes: Mapping[str, Sequence[int]]
) -> int | None:
    """Return the number of channels that tensors of a network show; None where they show none.

    Args:
        config: of the network, with any number of channels.
        argument: `in_channels` or `out_channels`.
        shapes: of its tensors, by name.

    Raises:
        InputError: the network cannot be built.
    """
    for name, (before, after) in _shape_changes(argument, json.dumps(dict(config))).tensors.items():
        for axis, lengths in enumerate(zip(before, after, strict=True)):
            if lengths[0] == config[argument] != lengths[1] and len(shapes.get(name, ())) == len(before):
                return shapes[name][axis]
    return None


def axes_of(model: nn.Module) -> int:
    """Return the number of spatial axes of a network's images.

    Raises:
        InputError: the model was not built by `build_network`.
    """
    config = config_of(model)
    return network_spec(config["name"]).axes(config["options"])


def size_divisor_of(model: nn.Module) -> int:
    """Return the number every edge of an image must be divisible by; 1 for a model that does not say.

    A module that holds the network as `network` (a merged model) answers for it.
    """
    holder = model if hasattr(model, "size_divisor") else getattr(model, "network", model)
    return int(getattr(holder, "size_divisor", 1))


def _construct(spec: NetworkSpec, config: Mapping[str, Any]) -> nn.Module:
    try:
        model = spec.build(
            in_channels=config["in_channels"], out_channels=config["out_channels"], **config["options"]
        )
        return monai.prepare(model)
    except InputError:
        raise
    except Exception as error:
        # A network of a library may refuse its options with any exception.
        reason = first_line(error)
        raise InputError(f"network: {spec.name} cannot be built from {shown(config)}: {reason}") from error


class _Changes(NamedTuple):
    """Shapes of tensors with one number of channels and with another.

    Attributes:
        parameters: their names, in registration order, of those that change or are not in both.
        tensors: by name, of the parameters and buffers that have as many axes in both.
        odd: names of the other tensors.
    """

    parameters: tuple[str, ...]
    tensors: dict[str, tuple[torch.Size, torch.Size]]
    odd: tuple[str, ...]


def _dependent_on(argument: str, config_json: str) -> tuple[str, ...]:
    """Return the names of the parameters whose shapes change with `argument`, in registration order."""
    names = _shape_changes(argument, config_json).parameters
    if not names:
        raise InputError(f"network: no parameter of {json.loads(config_json)['name']} depends on {argument}")
    return names


@cache
def _shape_changes(argument: str, config_json: str) -> _Changes:
    config = json.loads(config_json)
    spec = network_spec(config["name"])
    before = _shapes(spec, config)
    found: list[_Changes] = []
    # Some networks want channel counts that divide each other; some have tensors more or less by coincidence.
    for count in (config[argument] + 1, config[argument] * 2):
        with suppress(InputError):
            found.append(_changes(before, _shapes(spec, {**config, argument: count})))
    if not found:
        raise InputError(
            f"network: {spec.name} cannot be built with other {argument} than {config[argument]}"
        )
    return min(found, key=lambda changes: len(changes.odd))


def _changes(before: "_Shapes", after: "_Shapes") -> _Changes:
    every, other = before.parameters | before.buffers, after.parameters | after.buffers
    alike = {
        name: (shape, other[name])
        for name, shape in every.items()
        if name in other and len(other[name]) == len(shape)
    }
    return _Changes(
        tuple(name for name, shape in before.parameters.items() if other.get(name) != shape),
        alike,
        tuple(name for name in every | other if name not in alike),
    )


class _Shapes(NamedTuple):
    """Shapes by name."""

    parameters: dict[str, torch.Size]
    buffers: dict[str, torch.Size]


def _shapes(spec: NetworkSpec, config: Mapping[str, Any]) -> _Shapes:
    try:
        with torch.device("meta"):
            model = _construct(spec, config)
    except InputError:
        # Constructors that look at values of tensors do not run without memory.
        with torch.random.fork_rng(devices=[]):
            model = _construct(spec, config)
    return _Shapes(
        {name: parameter.shape for name, parameter in model.named_parameters()},
        {name: buffer.shape for name, buffer in model.named_buffers()},
    )
