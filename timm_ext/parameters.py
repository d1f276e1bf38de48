"""Which tensors of a network are merged, where each lies in the flat buffer, which models fit together."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from timm_ext.errors import InputError, lines_of, listed

_NORMS = (
    nn.modules.batchnorm._NormBase,  # batch and instance norms of every dimension
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return each parameter once, under the first name it was registered with.

    A `state_dict` names a tied or doubly registered tensor several times; a merge or a Fisher over it would
    count it as often. Two parameters are one when they cover the same memory, also as different views.

    Raises:
        InputError: a lazy parameter has no shape yet, or two parameters overlap in part.
    """
    aliases = parameter_aliases(model)
    every = dict(model.named_parameters(remove_duplicate=False))
    return {name: every[name] for name, first in aliases.items() if name == first}


def parameter_aliases(model: nn.Module) -> dict[str, str]:
    """Map every name a parameter is registered under to its first name, in registration order.

    Raises:
        InputError: a lazy parameter has no shape yet, or two parameters overlap in part.
    """
    first_of_object: dict[int, str] = {}
    first_of_span: dict[tuple[object, int, int], str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise InputError(
                f"{name}: expected a parameter with a shape (got a lazy one: run one forward first)"
            )
        first = first_of_object.setdefault(id(parameter), name)
        if first == name and (span := _memory_span(parameter)) is not None:
            first = first_of_span.setdefault(span, name)
        aliases[name] = first
    _refuse_overlaps(first_of_span)
    return aliases


def _memory_span(tensor: Tensor) -> tuple[object, int, int] | None:
    """Return (device, first byte, one past the last byte), or None for a tensor without memory."""
    if tensor.numel() == 0 or tensor.is_meta:
        return None
    extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return tensor.device, begin, begin + extent * tensor.element_size()


def _refuse_overlaps(names: Mapping[tuple[object, int, int], str]) -> None:
    spans = sorted(names, key=lambda span: (str(span[0]), span[1], span[2]))
    for left, right in pairwise(spans):
        if left[0] == right[0] and right[1] < left[2]:
            raise InputError(
                f"{names[right]}: expected memory of its own (got memory that overlaps {names[left]} in part)"
            )


@dataclass(frozen=True)
class Split:
    """Names of the parameters that are merged and of those that belong to one task.

    Attributes:
        shared: merged among the source models (the paper's P).
        specific: initialised anew for the target task (the paper's S).
        transfer_norms: whether norms are merged, which norms without parameters follow, too; None where it is
            to be seen from the shared names, as `buffer_owners` says.
    """

    shared: tuple[str, ...]
    specific: tuple[str, ...]
    transfer_norms: bool | None = None


def split_parameters(model: nn.Module, *, heads: Sequence[str], transfer_norms: bool = False) -> Split:
    """Tell shared from task-specific parameters: heads and, unless transferred, norms are task-specific.

    As in T-IMM (Geyer et al., MIDL 2019), where the output layers and all instance norms belong to a task.

    Args:
        model: the network.
        heads: shell patterns on parameter names, each of which must match something; one that ends in a dot,
            such as `"head*."`, stands for all parameters below.
        transfer_norms: merge the affine parameters of instance, group, layer and batch norms, too, and the
            running statistics of norms without any.

    Raises:
        InputError: a pattern matches nothing, or no parameter is left to share.
    """
    aliases = parameter_aliases(model)
    unmatched = [pattern for pattern in heads if not any(matches(name, [pattern]) for name in aliases)]
    if unmatched:
        raise InputError(
            f"heads: expected patterns that match parameters (got {listed(map(repr, unmatched))}, "
            f"which match none of {listed(aliases)})"
        )
    specific = {first for name, first in aliases.items() if matches(name, heads)}
    if not transfer_norms:
        specific |= {aliases[name] for name in _norm_parameters(model)}
    names = [name for name, first in aliases.items() if name == first]
    if len(specific) == len(names):
        raise InputError(
            f"heads: expected at least one shared parameter to remain (got all of {listed(names)})"
        )
    return Split(
        shared=tuple(name for name in names if name not in specific),
        specific=tuple(name for name in names if name in specific),
        transfer_norms=transfer_norms,
    )


def buffer_owners(
    model: nn.Module, shared: Sequence[str], *, transfer_norms: bool | None = None
) -> dict[str, tuple[str, ...]]:
    """Return the buffers that follow shared parameters, each with the names of those parameters.

    A buffer belongs to the parameters of its module or, if that has none, of the nearest module around it
    that has some: the running mean of a norm to the norm's weight and bias. Where these are all
    task-specific, it is, too. Buffers that are no part of the state are left out.

    A norm without parameters is treated as one with them: its running statistics are task-specific unless
    norms are transferred. Then they belong to the layer that feeds the norm, for which the module with
    parameters of its own that is registered right before the norm is taken (where there is none, the one
    right after it); they are task-specific where that layer is, or the module around the norm.

    Args:
        model: the network.
        shared: names of its shared parameters, each its parameter's first.
        transfer_norms: whether norms without parameters are merged; None: where `shared` names a parameter
            of another norm.
    """
    aliases = parameter_aliases(model)
    wanted = set(shared)
    if transfer_norms is None:
        transfer_norms = any(aliases[name] in wanted for name in _norm_parameters(model))
    feeders = _feeders_of_plain_norms(model)
    owners = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if name in aliases or not isinstance(value, Tensor):
            continue
        module = path = name.rpartition(".")[0]
        while path and not any(True for _ in model.get_submodule(path).parameters()):
            path = path.rpartition(".")[0]
        inside = {first for other, first in aliases.items() if not path or other.startswith(f"{path}.")}
        if module in feeders and inside & wanted:
            layer = [other for other in aliases if other.rpartition(".")[0] == feeders[module]]
            inside = {aliases[other] for other in layer} if transfer_norms else set()
        if inside & wanted:
            owners[name] = tuple(first for first in shared if first in inside)
    return owners


def _feeders_of_plain_norms(model: nn.Module) -> dict[str, str]:
    """Return each module that has running statistics but no parameters, with the layer that feeds it."""
    feeders: dict[str, str] = {}
    before: str | None = None
    waiting: list[str] = []
    for path, module in model.named_modules(remove_duplicate=False):
        if any(True for _ in module.parameters(recurse=False)):
            before = path
            feeders |= dict.fromkeys(waiting, path)
            waiting = []
        elif "running_mean" in dict(module.named_buffers(recurse=False)):
            if before is None:
                waiting.append(path)
            else:
                feeders[path] = before
    return feeders


def _norm_parameters(model: nn.Module) -> Iterator[str]:
    for path, module in model.named_modules(remove_duplicate=False):
        if is_norm(module):
            for name, _ in module.named_parameters(recurse=False):
                yield f"{path}.{name}" if path else name


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module is a norm: one of PyTorch's, or of a class called so with 1-D parameters."""
    if isinstance(module, _NORMS):
        return True
    own = list(module.parameters(recurse=False))
    return "norm" in type(module).__name__.lower() and bool(own) and all(p.ndim <= 1 for p in own)


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

    @classmethod
    def from_list(cls, entries: Sequence[Mapping[str, Any]]) -> "Layout":
        """Rebuild a layout from `to_list`."""
        return cls(tuple(Entry(**{**entry, "shape": tuple(entry["shape"])}) for entry in entries))


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


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Tell whether a shell pattern fits a name; one that ends in a dot stands for all names below."""
    return any(fnmatchcase(name, p + "*" if p.endswith(".") else p) for p in patterns)
