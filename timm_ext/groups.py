"""Groups of elements that share mixing logits, from the whole model down to the single element."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from timm_ext.errors import InputError
from timm_ext.layout import Entry, Layout

Granularity = Literal["model", "layer", "filter", "kernel", "element"]
GRANULARITIES: tuple[Granularity, ...] = ("model", "layer", "filter", "kernel", "element")


@dataclass(frozen=True)
class Groups:
    """Which elements of a layout share one row of mixing logits.

    Attributes:
        offsets: `[S + 1]` int64, bounds of the segments; strictly increasing from 0 to P.
        rows: `[S]` int64, the group of each segment.
        names: `[G]`, what each group is, such as `"encoder.0.conv[3, 1]"` for a kernel (output 3, input 1).
    """

    offsets: Tensor
    rows: Tensor
    names: Sequence[str]


class GroupNames(Sequence[str]):
    """Names of groups, made when asked for: a network has hundreds of thousands of kernels."""

    def __init__(self, blocks: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]]):
        """Take blocks of (label, shape of the block's groups, order of the axes in the name)."""
        self._blocks = tuple(blocks)
        self._ends: list[int] = []
        for _, shape, _ in self._blocks:
            self._ends.append((self._ends[-1] if self._ends else 0) + math.prod(shape))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        position = range(len(self))[index]
        block = bisect_right(self._ends, position)
        label, shape, order = self._blocks[block]
        position -= self._ends[block - 1] if block else 0
        place: list[int] = []
        for size in reversed(shape):
            position, remainder = divmod(position, size)
            place.insert(0, remainder)
        return f"{label}[{', '.join(str(place[axis]) for axis in order)}]" if shape else label


def make_groups(layout: Layout, granularity: Granularity) -> Groups:
    """Divide a layout into groups of elements that share mixing logits.

    `model`: one group. `layer`: weight and bias of a module. `filter`: an output channel of a module and its
    bias. `kernel`: one (output, input) pair of a weight; a bias or norm is then grouped by output channel.
    `element`: each by itself. Neighbouring segments of one group are joined.

    Args:
        layout: the tensors, P elements in all.
        granularity: one of the above.

    Returns:
        G groups in S segments.

    Raises:
        InputError: `granularity` is not one of these, or the layout is empty.
    """
    if granularity not in GRANULARITIES:
        raise InputError(f"granularity: expected one of {', '.join(GRANULARITIES)} (got {granularity!r})")
    if layout.numel == 0:
        raise InputError("layout: expected at least one element to group (got none)")
    numbering = _Numbering(layout, granularity)
    rows, lengths = zip(*(numbering.segments(entry) for entry in layout.entries if entry.numel), strict=True)
    return _join(torch.cat(rows), torch.cat(lengths), numbering.names())


class _Numbering:
    """Hands out group numbers: elements with the same key are in the same block of groups."""

    def __init__(self, layout: Layout, granularity: Granularity):
        self._granularity = granularity
        self._first: dict[object, int] = {}
        self._blocks: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
        self._labels: set[str] = set()
        self._count = 0

    def names(self) -> GroupNames:
        return GroupNames(self._blocks)

    def segments(self, entry: Entry) -> tuple[Tensor, Tensor]:
        """Return group and length of each span of an entry, both `[spans]`, before neighbours are joined."""
        if self._granularity == "model":
            return _spans(torch.tensor([self._block("model", "model", ())]), entry)
        if self._granularity == "layer":
            return _spans(torch.tensor([self._block(entry.layer, entry.layer or entry.name, ())]), entry)
        if self._granularity == "element":
            first = self._block(entry.name, entry.name, entry.shape)
            return _spans(first + torch.arange(entry.numel), entry)
        if self._granularity == "kernel" and entry.in_dim is not None and entry.out_dim is not None:
            axes = (entry.out_dim, entry.in_dim)
            first = self._block(entry.name, entry.layer or entry.name, entry.shape[:2], axes, entry.name)
            return _spans(first + torch.arange(math.prod(entry.shape[:2])), entry)
        key = (entry.layer, entry.out_channels)
        first = self._block(key, entry.layer or entry.name, (entry.out_channels,), fallback=entry.name)
        return _spans(first + _channel_of_spans(entry), entry)

    def _block(
        self,
        key: object,
        label: str,
        shape: tuple[int, ...],
        order: tuple[int, ...] | None = None,
        fallback: str | None = None,
    ) -> int:
        """Return the first group of block `key`, made if it is new; a label is used once, then `fallback`."""
        if key not in self._first:
            self._first[key] = self._count
            self._count += math.prod(shape)
            label = fallback if label in self._labels and fallback is not None else label
            self._labels.add(label)
            self._blocks.append((label, shape, order or tuple(range(len(shape)))))
        return self._first[key]


def _channel_of_spans(entry: Entry) -> Tensor:
    """Return the output channel of each contiguous span of an entry, in memory order."""
    if entry.out_dim != 1:
        return torch.arange(entry.out_channels)
    rows, per_group = entry.shape[:2]
    group_of_row = torch.arange(rows) // (rows // entry.channel_groups)
    return (group_of_row[:, None] * per_group + torch.arange(per_group)).reshape(-1)


def _spans(rows: Tensor, entry: Entry) -> tuple[Tensor, Tensor]:
    return rows, torch.full((len(rows),), entry.numel // len(rows))


def _join(rows: Tensor, lengths: Tensor, names: GroupNames) -> Groups:
    ends = lengths.cumsum(0)
    last = torch.ones(len(rows), dtype=torch.bool)
    last[:-1] = rows[1:] != rows[:-1]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), ends[last]])
    return Groups(offsets=offsets, rows=rows[last], names=names)
