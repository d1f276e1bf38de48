"""Where each tensor of a network lies in the flat buffer, and which models fit together."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from timm_ext.errors import InputError, lines_of, listed
from timm_ext.parameters import buffer_owners, matches, named_parameters


@dataclass(frozen=True)
class Entry:
    """One tensor of a layout.

    Attributes:
        name: parameter name.
        shape: its shape.
        layer: path of the module that owns it; weight and bias of a layer agree in it.
        out_dim: axis of the output channels, None for a scalar.
        in_dim: axis of the input channels, None for biases and norms.
        channel_groups: groups of a grouped transposed convolution, whose weight `[C_in, C_out / groups, ...]`
            holds each output channel only in part of its rows; 1 for everything else.
    """

    name: str
    shape: tuple[int, ...]
    layer: str
    out_dim: int | None
    in_dim: int | None
    channel_groups: int = 1

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def out_channels(self) -> int:
        """Number of output channels, 1 for a scalar."""
        return 1 if self.out_dim is None else self.shape[self.out_dim] * self.channel_groups


@dataclass(frozen=True)
class Layout:
    """Order and place of named tensors in one flat buffer of P elements.

    Attributes:
        entries: the tensors, in order.
        buffers: names of the model's buffers that belong to them, see `buffer_owners`; none without a model.
    """

    entries: tuple[Entry, ...]
    buffers: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def from_model(
        cls, model: nn.Module, names: Sequence[str], *, transfer_norms: bool | None = None
    ) -> "Layout":
        """Lay out the parameters `names` of a model, in that order, with channel axes by layer type.

        Args:
            model: the network.
            names: of its parameters, each its parameter's first.
            transfer_norms: whether norms without parameters are merged, see `buffer_owners`.

        Raises:
            InputError: a name is not a parameter of the model (or is a second name of one).
        """
        parameters = named_parameters(model)
        if unknown := [name for name in names if name not in parameters]:
            raise InputError(f"layout: expected names of the model's parameters (got {listed(unknown)})")
        entries = tuple(_entry_of(model, name, parameters[name]) for name in names)
        return cls(entries, tuple(buffer_owners(model, names, transfer_norms=transfer_norms)))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Layout":
        """Lay out tensors without a model: layers are names up to the last dot, axes `[out, in, ...]`.

        Only a model tells a transposed convolution, so use `from_model` where there is one.
        """
        return cls(tuple(_entry(name, tuple(tensor.shape)) for name, tensor in tensors.items()))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names in order."""
        return tuple(entry.name for entry in self.entries)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First element of each tensor."""
        starts = [0]
        for entry in self.entries[:-1]:
            starts.append(starts[-1] + entry.numel)
        return tuple(starts[: len(self.entries)])

    @cached_property
    def numel(self) -> int:
        """Number of elements P."""
        return sum(entry.numel for entry in self.entries)

    def flatten(self, tensors: Mapping[str, Tensor], *, out: Tensor | None = None) -> Tensor:
        """Join named tensors into one buffer; names that the layout does not hold are ignored.

        Args:
            tensors: by name, with the layout's shapes.
            out: `[P]`, filled and returned (its dtype and device hold); differentiable only without it.

        Returns:
            `[P]`.

        Raises:
            InputError: tensors are missing or of another shape; all are listed.
        """
        check_compatible({"tensors": tensors}, layout=self)
        if out is None:
            return torch.cat([tensors[name].reshape(-1) for name in self.names])
        with torch.no_grad():
            for entry, start in zip(self.entries, self.offsets, strict=True):
                out[start : start + entry.numel].copy_(tensors[entry.name].reshape(-1))
        return out

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Name the parts of `flat` `[P]` as views; the backward is one concatenation."""
        parts = torch.split(flat, [entry.numel for entry in self.entries])
        return {e.name: part.view(e.shape) for e, part in zip(self.entries, parts, strict=True)}

    def to_list(self) -> list[dict[str, Any]]:
        """Return the entries as JSON values."""
        return [{**vars(entry), "shape": list(entry.shape)} for entry in self.entries]


def _entry_of(model: nn.Module, name: str, parameter: nn.Parameter) -> Entry:
    owner = model.get_submodule(name.rpartition(".")[0])
    shape = tuple(parameter.shape)
    if isinstance(owner, nn.modules.conv._ConvNd) and owner.transposed and len(shape) > 1:
        layer = name.rpartition(".")[0]
        return Entry(name, shape, layer, out_dim=1, in_dim=0, channel_groups=owner.groups)
    return _entry(name, shape)


def _entry(name: str, shape: tuple[int, ...]) -> Entry:
    return Entry(
        name=name,
        shape=shape,
        layer=name.rpartition(".")[0],
        out_dim=0 if shape else None,
        in_dim=1 if len(shape) > 1 else None,
    )


def compatibility_report(
    models: Mapping[str, Mapping[str, Tensor]], *, layout: Layout | None = None, ignore: Sequence[str] = ()
) -> list[str]:
    """List every tensor that keeps models from being merged: missing, unexpected, of another shape or type.

    Args:
        models: named tensors of each model by the model's name; the others are held against the first.
        layout: hold all of them against this instead; tensors that it does not name are then free.
        ignore: shell patterns on tensor names that may differ, such as the heads.

    Returns:
        One line per mismatch, empty if the models fit.
    """
    if layout is not None:
        return [
            line
            for name, tensors in models.items()
            for line in _against_layout(name, tensors, layout, ignore)
        ]
    (first, expected), *others = models.items() or [("", {})]
    return [line for name, got in others for line in _against_model(name, got, first, expected, ignore)]


def check_compatible(
    models: Mapping[str, Mapping[str, Tensor]], *, layout: Layout | None = None, ignore: Sequence[str] = ()
) -> None:
    """Refuse models that do not fit together; takes the arguments of `compatibility_report`.

    Raises:
        InputError: with one line for each tensor that differs.
    """
    if lines := compatibility_report(models, layout=layout, ignore=ignore):
        raise InputError(f"models: expected the same tensors (got {len(lines)} that differ){lines_of(lines)}")


def _against_layout(
    model: str, tensors: Mapping[str, Tensor], layout: Layout, ignore: Sequence[str]
) -> Iterator[str]:
    for entry in layout.entries:
        if matches(entry.name, ignore):
            continue
        shape = list(entry.shape)
        if entry.name not in tensors:
            yield f"{model}: {entry.name}: expected {shape} (got none)"
        elif tuple(tensors[entry.name].shape) != entry.shape:
            yield f"{model}: {entry.name}: expected {shape} (got {list(tensors[entry.name].shape)})"
        elif not tensors[entry.name].is_floating_point():
            yield f"{model}: {entry.name}: expected floating point (got {tensors[entry.name].dtype})"


def _against_model(
    model: str,
    tensors: Mapping[str, Tensor],
    first: str,
    expected: Mapping[str, Tensor],
    ignore: Sequence[str],
) -> Iterator[str]:
    for name, tensor in expected.items():
        got = tensors.get(name)
        if matches(name, ignore):
            continue
        if got is None:
            yield f"{model}: {name}: expected {list(tensor.shape)} as in {first} (got none)"
        elif got.shape != tensor.shape:
            yield f"{model}: {name}: expected {list(tensor.shape)} as in {first} (got {list(got.shape)})"
        elif got.dtype != tensor.dtype:
            yield f"{model}: {name}: expected {tensor.dtype} as in {first} (got {got.dtype})"
    for name, tensor in tensors.items():
        if name not in expected and not matches(name, ignore):
            yield f"{model}: {name}: expected none as in {first} (got {list(tensor.shape)})"
