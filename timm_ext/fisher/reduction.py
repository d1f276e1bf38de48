"""Sums of Fishers over the processes of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from timm_ext.errors import InputError, lines_of, shown


@dataclass(frozen=True)
class Share:
    """What one process tells the others before sums are added.

    Attributes:
        settings: anything that must agree, as one line.
        shapes: of the accumulators by name.
        ids: examples seen.
        coverage: rules by parameter name, as far as known.
        zero: structurally zero parameters, None without an example.
        broken: whether an update failed half-way.
    """

    settings: str
    shapes: dict[str, tuple[int, ...]]
    ids: tuple[str, ...]
    coverage: dict[str, frozenset[str]]
    zero: frozenset[str] | None
    broken: bool


def all_gather(share: Share) -> list[Share]:
    """Return the shares of all processes in order of rank.

    Raises:
        InputError: on every rank alike: an update failed, models or settings differ, or an example was
            counted twice.
    """
    shares: list[Share] = [share] * distributed.get_world_size()
    distributed.all_gather_object(shares, share)
    _check_alike(shares)
    _check_once([other.ids for other in shares])
    return shares


def add_over_ranks(sums: Mapping[str, Tensor]) -> None:
    """Replace each tensor by its sum over all ranks, added in float64, tensor by tensor."""
    for tensor in sums.values():
        total = tensor.to(torch.float64)
        distributed.all_reduce(total)
        tensor.copy_(total)


def _check_alike(shares: Sequence[Share]) -> None:
    first = shares[0]
    if broken := [str(rank) for rank, share in enumerate(shares) if share.broken]:
        raise InputError(f"rank {', '.join(broken)}: expected whole updates (got one that failed half-way)")
    for rank, other in enumerate(shares[1:], start=1):
        if other.settings != first.settings:
            raise InputError(
                f"rank {rank}: expected the settings of rank 0, {shown(first.settings)} (got "
                f"{shown(other.settings)})"
            )
        names = [
            name
            for name in {**first.shapes, **other.shapes}
            if first.shapes.get(name) != other.shapes.get(name)
        ]
        if names:
            listing = [f"{n}: {_shape(first, n)} on rank 0, {_shape(other, n)} on rank {rank}" for n in names]
            raise InputError(f"rank {rank}: expected the model of rank 0 (got another){lines_of(listing)}")


def _shape(share: Share, name: str) -> str:
    return str(list(share.shapes[name])) if name in share.shapes else "none"


def _check_once(parts: Sequence[Sequence[str]]) -> None:
    owner: dict[str, int] = {}
    for rank, ids in enumerate(parts):
        for id in ids:
            if id in owner:
                raise InputError(
                    f"example {id}: expected on one rank only (got ranks {owner[id]} and {rank}; "
                    "do not let a sampler pad the last batch)"
                )
            owner[id] = rank
