"""Buffers of merged networks, such as the running statistics of batch norms: they follow the merge."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from timm_ext.checkpoint import non_finite
from timm_ext.errors import InputError, lines_of
from timm_ext.layout import Entry, Layout
from timm_ext.ops.merge import fused_merge

_COUNTER = "num_batches_tracked"


@dataclass(frozen=True, eq=False)
class Buffers:
    """Buffers of T source models that belong to merged parameters.

    A floating-point buffer is the mean over the models, weighted by the ratios of the parameters it belongs
    to, as `timm_ext.parameters.buffer_owners` says:

        b* = Σ_t α_t b_t        with α_t ≥ 0, Σ_t α_t = 1

    Buffers have no Fisher, so that F = 1, as for every tensor without one. Of a counter of batches
    (`num_batches_tracked`) the largest is taken. Other buffers, such as indices, must be the same in all
    models and stay as they are.

    Attributes:
        values: floating-point buffers, `[T, *shape]` by name.
        fixed: the others, `[*shape]` by name.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    fixed: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def collect(cls, models: Mapping[str, Mapping[str, Tensor]], names: Iterable[str]) -> "Buffers":
        """Copy buffers from the models' tensors; those that no model gives are left out.

        Args:
            models: tensors by name of each source model by its name.
            names: of the buffers.

        Raises:
            InputError: a buffer is missing in some of the models, has several shapes or types, is not finite,
                or is no counter and differs where it has no mean; all such buffers are listed.
        """
        given = [name for name in names if any(name in tensors for tensors in models.values())]
        if lines := [line for name in given for line in _problems(name, models)]:
            raise InputError(
                f"buffers: expected those that can be merged (got {len(lines)} that cannot){lines_of(lines)}"
            )
        values, fixed = {}, {}
        for name in given:
            rows = torch.stack([tensors[name].detach().cpu() for tensors in models.values()])
            if rows.is_floating_point():
                values[name] = rows
            else:
                fixed[name] = rows.amax(dim=0) if is_counter(name) else rows[0]
        return cls(values, fixed)

    def merged(self, ratios: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return all buffers of the merged network.

        Args:
            ratios: α of each floating-point buffer by its name, `[1, T]`, or `[elements, T]` for ratios of
                single elements.
        """
        means = {name: weighted_mean(rows, ratios[name]) for name, rows in self.values.items()}
        return means | self.fixed

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each buffer."""
        floating = {name: tuple(rows.shape[1:]) for name, rows in self.values.items()}
        return floating | {name: tuple(value.shape) for name, value in self.fixed.items()}


def is_counter(name: str) -> bool:
    """Tell whether a tensor of this name counts batches."""
    return name.rpartition(".")[2] == _COUNTER


def weighted_mean(rows: Tensor, ratios: Tensor) -> Tensor:
    """Return Σ_t α_t b_t of `rows` `[T, *shape]` for α `[1, T]` or `[elements, T]`, in the rows' type."""
    flat = rows.reshape(len(rows), -1).contiguous()
    wide = flat.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)
    ends = torch.arange(1, len(ratios)) if len(ratios) > 1 else torch.empty(0, dtype=torch.int64)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), ends, torch.tensor([flat.shape[1]])])
    if flat.shape[1] == 0:
        return rows[0].clone()
    merged = fused_merge(wide, None, ratios.double(), offsets, mixing="ratios")
    return merged.to(rows.dtype).reshape(rows.shape[1:])


def check_buffers(network: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse a network that lacks a buffer or has it in another shape.

    Raises:
        InputError: all such buffers are listed.
    """
    own = network.state_dict()
    lines = [
        f"{name}: expected {list(shape)} (got {list(own[name].shape) if name in own else 'none'})"
        for name, shape in shapes.items()
        if name not in own or tuple(own[name].shape) != tuple(shape)
    ]
    if lines:
        raise InputError(
            f"network: expected the buffers of the bank (got {len(lines)} that differ){lines_of(lines)}"
        )


@torch.no_grad()
def set_buffers(network: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into the buffers of a network that has them all."""
    own = network.state_dict()
    for name, value in values.items():
        own[name].copy_(value)


def holds_buffers(network: nn.Module, values: Mapping[str, Tensor]) -> bool:
    """Tell whether a network's buffers have given values, in the type and on the device they are now."""
    own = network.state_dict()
    return all(
        not own[name].is_meta and torch.equal(own[name].cpu(), value.to(own[name].dtype))
        for name, value in values.items()
    )


def ratios_beside(
    shape: Sequence[int],
    owners: Sequence[str],
    layout: Layout,
    ratios: Tensor,
    offsets: Tensor,
    rows: Tensor | None,
) -> Tensor:
    """Return the ratios of a buffer from those of the parameters it belongs to.

    Element by element where these have its shape, as the weight and bias of a norm have that of its running
    mean, and channel by channel where they have as many output channels, as a convolution has that feeds a
    norm, with the mean over them; otherwise the mean over all their elements.

    Args:
        shape: of the buffer.
        owners: names of the parameters.
        layout: that has them.
        ratios: α `[G, T]`, those of a row non-negative with the sum 1.
        offsets: of the segments, `[S + 1]`.
        rows: group of each segment, `[S]`; None: each is its own.

    Returns:
        `[elements, T]` or `[1, T]`.
    """
    starts = dict(zip(layout.names, zip(layout.offsets, layout.entries, strict=True), strict=True))
    entries = [starts[name] for name in owners]
    alike = [(start, entry) for start, entry in entries if _is_alike(entry, tuple(shape))]
    total = torch.zeros(1, ratios.shape[1], dtype=torch.float64)
    for start, entry in alike or entries:
        first = int(torch.searchsorted(offsets, start, right=True)) - 1
        last = int(torch.searchsorted(offsets, start + entry.numel))
        groups = torch.arange(first, last) if rows is None else rows[first:last]
        ends = offsets[first : last + 1].clamp(start, start + entry.numel)
        alpha = ratios[groups].double()
        if alike:
            total = total + _by_channel(alpha.repeat_interleave(ends.diff(), dim=0), entry, tuple(shape))
        else:
            total = total + (alpha * ends.diff()[:, None]).sum(dim=0)
    return total / total.sum(dim=1, keepdim=True)


def _is_alike(entry: Entry, shape: tuple[int, ...]) -> bool:
    """Tell whether a parameter has the shape of a buffer, or as many output channels as that has elements."""
    return entry.shape == shape or (entry.out_dim is not None and shape == (entry.shape[entry.out_dim],))


def _by_channel(alpha: Tensor, entry: Entry, shape: tuple[int, ...]) -> Tensor:
    """Sum the ratios `[elements, T]` of a parameter over all but the axis that a buffer has, too."""
    if entry.shape == shape or entry.out_dim is None:
        return alpha
    wide = alpha.reshape(*entry.shape, -1).movedim(entry.out_dim, 0)
    return wide.reshape(*shape, -1, alpha.shape[1]).sum(dim=1)


def _problems(name: str, models: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """Return one line for each reason why a buffer cannot be merged."""
    first, *others = models
    found = {model: tensors.get(name) for model, tensors in models.items()}
    if missing := [model for model, value in found.items() if value is None]:
        return [f"{model}: {name}: expected it as in the other models (got none)" for model in missing]
    there = {model: value for model, value in found.items() if value is not None}
    lead = there[first]
    for model in others:
        if (there[model].shape, there[model].dtype) != (lead.shape, lead.dtype):
            got = f"{list(there[model].shape)} {there[model].dtype}"
            return [f"{model}: {name}: expected {list(lead.shape)} {lead.dtype} as in {first} (got {got})"]
    if lead.is_floating_point():
        return [f"{model}: {line}" for model in there for line in non_finite({name: there[model]})]
    if is_counter(name):
        return []
    return [
        f"{model}: {name}: expected the same {lead.dtype} as in {first}, which has no mean (got others)"
        for model in others
        if not torch.equal(there[model].cpu(), lead.cpu())
    ]
