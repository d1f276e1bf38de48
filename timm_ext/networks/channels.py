"""Which channels of a network may change places without changing what it computes."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from timm_ext.errors import InputError

FIXED = "fixed"  # mark of channels that have a place of their own: images and output regions


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that may change places among each other.

    Attributes:
        name: the first layer that has them; `layer#2` for the second group of a layer.
        blocks: places `[b, m]` of the n = b·m channels: whole blocks change places, and channels within one.
            A group norm makes b > 1.
    """

    name: str
    blocks: Tensor

    @property
    def size(self) -> int:
        """Number of channels n."""
        return self.blocks.numel()


@dataclass(frozen=True)
class ChannelAxis:
    """The channels along one axis of a tensor.

    Attributes:
        tensor: name of the parameter or buffer.
        axis: of the tensor.
        length: of the axis.
        positions: name of a group → where its channels lie along the axis, `[n, copies]`.
    """

    tensor: str
    axis: int
    length: int
    positions: Mapping[str, Tensor]

    def order(self, permutations: Mapping[str, Tensor]) -> Tensor:
        """Return, for each place along the axis, the place that its content comes from, `[length]`."""
        order = torch.arange(self.length)
        for group, places in self.positions.items():
            if group in permutations:
                order[places] = places[permutations[group]]
        return order


@dataclass(frozen=True)
class ChannelMap:
    """All groups of channels of a network and where they occur.

    Attributes:
        groups: by name.
        axes: of all tensors that hold channels of the groups.
        unfollowed: functions whose channels stay where they are.
    """

    groups: Mapping[str, ChannelGroup]
    axes: tuple[ChannelAxis, ...]
    unfollowed: tuple[str, ...] = ()

    def permute(self, tensors: Mapping[str, Tensor], permutations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give channels new places, in parameters and buffers or in anything of their shapes, as a Fisher.

        Args:
            tensors: by name; those without channels of a group are returned as they are.
            permutations: name of a group → `[n]`, for each place the channel that comes there. Groups that
                are left out stay.

        Returns:
            The same names, permuted tensors copied.

        Raises:
            InputError: a group is unknown, a permutation does not fit it or would tear a block of it, or a
                tensor's axis has another length.
        """
        for name, permutation in permutations.items():
            self._check(name, permutation)
        permuted = dict(tensors)
        for axis in self.axes:
            if (tensor := permuted.get(axis.tensor)) is None or not axis.positions.keys() & permutations:
                continue
            if tensor.ndim <= axis.axis or tensor.shape[axis.axis] != axis.length:
                raise InputError(
                    f"{axis.tensor}: expected {axis.length} channels along axis {axis.axis} "
                    f"(got shape {list(tensor.shape)})"
                )
            order = axis.order(permutations).to(tensor.device)
            permuted[axis.tensor] = tensor.index_select(axis.axis, order)
        return permuted

    def _check(self, name: str, permutation: Tensor) -> None:
        if name not in self.groups:
            raise InputError(f"permutations: expected groups of the network (got {name!r})")
        group = self.groups[name]
        if not torch.equal(permutation.sort().values, torch.arange(group.size)):
            raise InputError(f"{name}: expected a permutation of {group.size} channels (got another)")
        moved = {tuple(sorted(row)) for row in permutation[group.blocks].tolist()}
        if moved != {tuple(row) for row in group.blocks.tolist()}:
            raise InputError(
                f"{name}: expected whole blocks of {group.blocks.shape[1]} channels to move, which a group "
                "norm keeps together (got a torn one)"
            )


class Slots:
    """Channels of a network in the making: slots, of which ties make one.

    Every axis of a tensor and every activation is a row of slots. Slots may change places if they occur alike
    in all axes and carry the same marks.
    """

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._marks: dict[int, set[str]] = {}
        self._axes: dict[tuple[str, int], list[int]] = {}
        self._norms: list[tuple[str, list[list[int]]]] = []

    def new(self, count: int) -> list[int]:
        """Return slots that are tied to nothing yet."""
        first = len(self._parent)
        self._parent += range(first, first + count)
        return list(range(first, first + count))

    def tie(self, one: Sequence[int], other: Sequence[int]) -> None:
        """Make two rows of the same length one, place by place."""
        for left, right in zip(one, other, strict=True):
            low, high = sorted((self._root(left), self._root(right)))
            self._parent[high] = low

    def mark(self, row: Iterable[int], mark: str) -> None:
        """Set slots apart from those without the mark."""
        for slot in row:
            self._marks.setdefault(slot, set()).add(mark)

    def occupy(self, tensor: str, axis: int, row: Sequence[int]) -> list[int]:
        """Note that a tensor has these slots along an axis; one that is used twice ties both rows."""
        known = self._axes.setdefault((tensor, axis), list(row))
        if len(known) != len(row):
            raise InputError(f"{tensor}: expected {len(known)} channels in all its uses (got {len(row)})")
        self.tie(known, row)
        return known

    def made_by(self, tensor: str, axis: int, count: int) -> list[int]:
        """Return the slots that a layer puts out: those of its weight's axis."""
        return self.occupy(tensor, axis, self._axes.get((tensor, axis)) or self.new(count))

    def normalise(self, layer: str, row: Sequence[int], groups: int) -> None:
        """Note that a norm takes the statistics of each of `groups` equal parts of a row together."""
        size = len(row) // groups
        if size > 1:
            self._norms.append((layer, [list(row[i : i + size]) for i in range(0, len(row), size)]))

    def channel_map(self) -> ChannelMap:
        """Return the groups of exchangeable channels and where they occur.

        Raises:
            InputError: group norms keep channels together that are not exchangeable; the layer is named.
        """
        classes = self._classes()
        place = {root: (name, i) for name, roots in classes.items() for i, root in enumerate(roots)}
        groups = {name: ChannelGroup(name, self._blocks(roots)) for name, roots in classes.items()}
        axes = []
        for (tensor, axis), row in self._axes.items():
            if positions := _positions([self._root(slot) for slot in row], place):
                axes.append(ChannelAxis(tensor, axis, len(row), positions))
        return ChannelMap(groups, tuple(axes))

    def _root(self, slot: int) -> int:
        while self._parent[slot] != slot:
            self._parent[slot] = slot = self._parent[self._parent[slot]]
        return slot

    def _classes(self) -> dict[str, list[int]]:
        """Return the roots that occur alike, two or more, by the name of the group."""
        signs: dict[int, Counter[object]] = {}
        for key, row in self._axes.items():
            for slot in row:
                signs.setdefault(self._root(slot), Counter())[key] += 1
        for slot, marks in self._marks.items():
            if (root := self._root(slot)) in signs:
                signs[root].update(dict.fromkeys(marks, 1))
        alike: dict[frozenset[tuple[object, int]], list[int]] = {}
        for root, sign in signs.items():
            if FIXED not in sign:
                alike.setdefault(frozenset(sign.items()), []).append(root)
        names: Counter[str] = Counter()
        classes = {}
        for roots in alike.values():
            if len(roots) > 1:
                layer = next(str(key[0]) for key in signs[roots[0]] if isinstance(key, tuple))
                layer = layer.rpartition(".")[0] or layer
                names[layer] += 1
                classes[layer if names[layer] == 1 else f"{layer}#{names[layer]}"] = roots
        return classes

    def _blocks(self, roots: list[int]) -> Tensor:
        """Return the places of the parts that norms keep together; one block if there is no such norm."""
        whole, place = set(roots), {root: i for i, root in enumerate(roots)}
        found: set[frozenset[int]] | None = None
        for layer, norm in self._norms:
            parts = [{self._root(slot) for slot in part} for part in norm]
            touched = {frozenset(part & whole) for part in parts if part & whole}
            if not touched or touched == {frozenset(whole)}:
                continue
            apart = sum(map(len, touched)) == len(whole) and len({len(part) for part in touched}) == 1
            if (
                not apart
                or any(not part <= whole for part in parts if part & whole)
                or found
                not in (
                    None,
                    touched,
                )
            ):
                raise InputError(
                    f"{layer}: expected a group norm whose groups hold channels of one origin, and the same "
                    "ones in all norms of these channels (got channels that cannot be told apart by groups)"
                )
            found = touched
        rows = sorted(sorted(place[root] for root in part) for part in found or {frozenset(whole)})
        return torch.tensor(rows)


def _positions(row: Sequence[int], place: Mapping[int, tuple[str, int]]) -> dict[str, Tensor]:
    """Return where the channels of each group lie in a row of roots, `[n, copies]`."""
    found: dict[str, dict[int, list[int]]] = {}
    for position, root in enumerate(row):
        if root in place:
            group, channel = place[root]
            found.setdefault(group, {}).setdefault(channel, []).append(position)
    return {group: torch.tensor(list(_ordered(places))) for group, places in found.items()}


def _ordered(places: Mapping[int, list[int]]) -> Iterator[list[int]]:
    return (places[channel] for channel in range(len(places)))
