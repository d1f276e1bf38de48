"""Estimates that were interrupted: the sums and the examples so far, on disk."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from timm_ext.checkpoint import load_checkpoint, save_checkpoint
from timm_ext.errors import InputError

if TYPE_CHECKING:
    from timm_ext.fisher.accumulator import FisherAccumulator

_KIND = "fisher-partial"


@dataclass(frozen=True)
class Partial:
    """What an accumulator holds.

    Attributes:
        sums: of squares by parameter name, float32 or float64.
        ids: examples seen, in order.
        coverage: rules by parameter name, as far as known.
        zero: structurally zero parameters, None without an example.
        settings: all that must agree to go on, as one line.
    """

    sums: dict[str, Tensor]
    ids: tuple[str, ...]
    coverage: dict[str, frozenset[str]]
    zero: frozenset[str] | None
    settings: str


class PartialFile:
    """Where one process keeps its part of an estimate while it runs.

    With each example goes a digest of its tensors, so that a run on other images, or on images prepared
    otherwise, is not taken for the same.

    Args:
        path: of the file; with several processes the rank is added to its name.
        model: whose Fisher it is.
        seconds: between two writes.
    """

    def __init__(self, path: Path | str, model: nn.Module, seconds: float):
        rank, self._processes = 0, 1
        if distributed.is_available() and distributed.is_initialized():
            rank, self._processes = distributed.get_rank(), distributed.get_world_size()
        self.path = Path(path) if self._processes == 1 else Path(f"{path}.{rank}")
        self._model = _digest(*model.state_dict().values())
        self._seconds = seconds
        self._written = time.monotonic()
        self._digests: dict[str, str] = {}
        self._awaited: set[str] = set()

    def restore(self, accumulator: "FisherAccumulator") -> None:
        """Give a new accumulator what an interrupted run with the same model and settings left, if anything.

        Raises:
            InputError: the file is damaged, or of another model or other settings.
        """
        if not self.path.exists():
            return
        checkpoint = load_checkpoint(self.path, kind=_KIND)
        about = checkpoint.metadata["partial"]
        settings = accumulator.partial().settings
        for what, found, wanted in (
            ("these settings", about["settings"], self._settings(settings)),
            ("this model", about["model"], self._model),
        ):
            if found != wanted:
                raise InputError(
                    f"{self.path}: expected an estimate with {what}, {wanted} (got {found}; delete the file "
                    "to start again)"
                )
        self._digests = about["examples"]
        self._awaited = set(self._digests)
        coverage = {name: frozenset(rules) for name, rules in about["coverage"].items()}
        zero = None if about["zero"] is None else frozenset(about["zero"])
        accumulator.restore(Partial(checkpoint.tensors, tuple(self._digests), coverage, zero, settings))

    def holds(self, x: Tensor, y: Any, ids: Sequence[str]) -> bool:
        """Tell whether the interrupted run has seen a batch; otherwise note it.

        Raises:
            InputError: it has seen a part of it, or other tensors under the same names.
        """
        names = [ids] if isinstance(ids, str) else list(ids)
        if len(names) != len(x):
            return False  # the accumulator refuses it
        labels = [*y] if isinstance(y, Tensor) else [None] * len(x)
        digests = {id: _digest(*pair) for id, *pair in zip(names, x, labels, strict=True)}
        known = [id for id in names if id in self._awaited]
        if not known:
            self._digests |= digests
            return False
        if other := [id for id in names if self._digests.get(id) != digests[id]]:
            raise InputError(
                f"{self.path}: expected the batches and the data of the interrupted run (got others in "
                f"example {', '.join(other)}; delete the file to start again)"
            )
        self._awaited -= set(known)
        return True

    def require_all_met(self) -> None:
        """Refuse data that lack examples of the interrupted run.

        Raises:
            InputError: naming them.
        """
        if self._awaited:
            raise InputError(
                f"{self.path}: expected the data of the interrupted run (got none of the examples "
                f"{', '.join(sorted(self._awaited))}; delete the file to start again)"
            )

    def due(self) -> bool:
        """Tell whether the next write is due."""
        return time.monotonic() - self._written >= self._seconds

    def write(self, partial: Partial) -> None:
        """Replace what is there.

        Raises:
            InputError: the file cannot be written.
        """
        about = {
            "examples": {id: self._digests[id] for id in partial.ids},
            "coverage": {name: sorted(rules) for name, rules in partial.coverage.items()},
            "zero": None if partial.zero is None else sorted(partial.zero),
            "settings": self._settings(partial.settings),
            "model": self._model,
        }
        save_checkpoint(self.path, partial.sums, kind=_KIND, partial=about)
        self._written = time.monotonic()

    def _settings(self, settings: str) -> str:
        return f"{settings} processes={self._processes}"


def remove_partial(path: Path | str) -> None:
    """Delete what an estimate kept at `path`, of all its processes."""
    path = Path(path)
    for file in [path, *path.parent.glob(f"{path.name}.*")]:
        file.unlink(missing_ok=True)


def _digest(*tensors: Tensor | None) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
