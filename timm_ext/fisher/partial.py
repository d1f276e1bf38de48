"""Estimates that were interrupted: the sums and the examples so far, on disk."""

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, distributed, nn

from timm_ext.checkpoint import load_checkpoint, save_checkpoint
from timm_ext.errors import InputError

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
        self._model = _fingerprint(model)
        self._seconds = seconds
        self._written = time.monotonic()

    def due(self) -> bool:
        """Tell whether the next write is due."""
        return time.monotonic() - self._written >= self._seconds

    def write(self, partial: Partial) -> None:
        """Replace what is there.

        Raises:
            InputError: the file cannot be written.
        """
        about = {
            "ids": list(partial.ids),
            "coverage": {name: sorted(rules) for name, rules in partial.coverage.items()},
            "zero": None if partial.zero is None else sorted(partial.zero),
            "settings": self._settings(partial),
            "model": self._model,
        }
        save_checkpoint(self.path, partial.sums, kind=_KIND, partial=about)
        self._written = time.monotonic()

    def read(self, like: Partial) -> Partial | None:
        """Return what an interrupted run with the same model and settings left, None where there is nothing.

        Args:
            like: of the new, empty accumulator.

        Raises:
            InputError: the file is damaged, or of another model or other settings.
        """
        if not self.path.exists():
            return None
        checkpoint = load_checkpoint(self.path, kind=_KIND)
        about = checkpoint.metadata["partial"]
        for what, found, wanted in (
            ("these settings", about["settings"], self._settings(like)),
            ("this model", about["model"], self._model),
        ):
            if found != wanted:
                raise InputError(
                    f"{self.path}: expected an estimate with {what}, {wanted} (got {found}; delete the "
                    "file to start again)"
                )
        return Partial(
            sums=checkpoint.tensors,
            ids=tuple(about["ids"]),
            coverage={name: frozenset(rules) for name, rules in about["coverage"].items()},
            zero=None if about["zero"] is None else frozenset(about["zero"]),
            settings=like.settings,
        )

    def _settings(self, partial: Partial) -> str:
        return f"{partial.settings} processes={self._processes}"


def remove_partial(path: Path | str) -> None:
    """Delete what an estimate kept at `path`, of all its processes."""
    path = Path(path)
    for file in [path, *path.parent.glob(f"{path.name}.*")]:
        file.unlink(missing_ok=True)


def _fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
