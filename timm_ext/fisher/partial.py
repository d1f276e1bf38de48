"""Estimates that were interrupted: the sums and the examples so far, on disk."""

import hashlib
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from timm_ext.checkpoint import load_checkpoint, save_checkpoint
from timm_ext.documents import validated
from timm_ext.errors import InputError, listed, shown

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


@dataclass(frozen=True)
class _About:
    """The metadata of a file: digests of the examples seen, in order, and of the model; else as `Partial`."""

    examples: dict[str, str]
    coverage: dict[str, list[str]]
    zero: list[str] | None
    settings: str
    model: str


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
        tensors = (value for value in model.state_dict().values() if isinstance(value, Tensor))
        self._model = _digest(*tensors)
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
        about = validated(_About, checkpoint.metadata.get("partial"), self.path, strict=True)
        fresh = accumulator.partial()
        for what, found, wanted in (
            ("these settings", about.settings, self._settings(fresh.settings)),
            ("this model", about.model, self._model),
        ):
            if found != wanted:
                raise InputError(
                    f"{self.path}: expected an estimate with {what}, {wanted} (got {shown(found)}; delete "
                    "the file to start again)"
                )
        self._check_sums(checkpoint.tensors, fresh.sums, about)
        self._digests = dict(about.examples)
        self._awaited = set(self._digests)
        coverage = {name: frozenset(rules) for name, rules in about.coverage.items()}
        zero = None if about.zero is None else frozenset(about.zero)
        accumulator.restore(Partial(checkpoint.tensors, tuple(self._digests), coverage, zero, fresh.settings))

    def _check_sums(self, found: dict[str, Tensor], wanted: dict[str, Tensor], about: "_About") -> None:
        """Refuse sums that are not those of the model's parameters."""
        odd = [
            name
            for name in {**wanted, **found}
            if name not in wanted
            or name not in found
            or (found[name].shape, found[name].dtype) != (wanted[name].shape, wanted[name].dtype)
            or not bool((found[name] >= 0).all())  # which NaN is not, either
        ]
        odd += sorted({*about.coverage, *(about.zero or ())} - wanted.keys())
        if odd or (about.zero is None) != (not about.examples):
            raise InputError(
                f"{self.path}: expected the sums of an interrupted estimate (got other ones"
                f"{f' in {listed(odd)}' if odd else ''}; delete the file to start again)"
            )

    def left_of(self, x: Tensor, y: Any, ids: list[str]) -> tuple[Tensor, Any, list[str]] | None:
        """Return the examples of a batch that the interrupted run has not seen, and note them; None for none.

        Args:
            x: `[B, ...]`.
            y: labels where they are needed; only a tensor `[B, ...]` can be divided.
            ids: of the examples.

        Raises:
            InputError: the interrupted run saw other tensors under the same names, or a part of a batch whose
                labels cannot be divided.
        """
        whole = not isinstance(y, Tensor) or not y.dim() or len(y) != len(x)
        labels = [None] * len(x) if whole else list(y)
        digests = {id: _digest(*pair) for id, *pair in zip(ids, x, labels, strict=True)}
        known = {id for id in ids if id in self._awaited}
        if other := [id for id in ids if id in known and self._digests[id] != digests[id]]:
            raise InputError(
                f"{self.path}: expected the data of the interrupted run (got others in example "
                f"{listed(other)}; delete the file to start again)"
            )
        left = [place for place, id in enumerate(ids) if id not in known]
        if known and left and y is not None and whole:
            raise InputError(
                f"{self.path}: expected the batches of the interrupted run (got {listed(sorted(known))} "
                "together with others; delete the file to start again)"
            )
        self._digests |= digests
        self._awaited -= known
        if not known:
            return x, y, ids
        return (x[left], y if y is None else y[left], [ids[place] for place in left]) if left else None

    def require_all_met(self) -> None:
        """Refuse data that lack examples of the interrupted run.

        Raises:
            InputError: naming them.
        """
        if self._awaited:
            raise InputError(
                f"{self.path}: expected the data of the interrupted run (got none of the examples "
                f"{listed(sorted(self._awaited))}; delete the file to start again)"
            )

    def due(self) -> bool:
        """Tell whether the next write is due."""
        return time.monotonic() - self._written >= self._seconds

    def write(self, partial: Partial) -> None:
        """Replace what is there.

        Raises:
            InputError: the file cannot be written.
        """
        about = _About(
            examples={id: self._digests[id] for id in partial.ids},
            coverage={name: sorted(rules) for name, rules in partial.coverage.items()},
            zero=None if partial.zero is None else sorted(partial.zero),
            settings=self._settings(partial.settings),
            model=self._model,
        )
        save_checkpoint(self.path, partial.sums, kind=_KIND, partial=asdict(about))
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
