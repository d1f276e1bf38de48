"""What the training cases decide of a start: heads that are fitted to them, and which source is taken."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from timm_ext.checkpoint import load_checkpoint, save_checkpoint
from timm_ext.documents import validated
from timm_ext.errors import InputError, listed
from timm_ext.merging import MergedModel
from timm_ext.parameters import named_parameters
from timm_ext.system.locks import folder_lock
from timm_ext.training.device import launch
from timm_ext.training.state import STATE_NAME, refuse_begun
from timm_ext.transfer.head import FittedHead, fit_head
from timm_ext.transfer.session import Session
from timm_ext.transfer.start import Start

NOTE_NAME = "start.safetensors"
OWN = "start"
"""Under which the evidence of a start without alternatives stands."""

_KIND = "start"


@dataclass(frozen=True)
class _Decision:
    """What was decided: the log evidence of each candidate, which was taken, and its heads."""

    evidence: Mapping[str, float]
    taken: str
    head: FittedHead


@dataclass(frozen=True)
class _Note:
    """What the file says beside the heads."""

    evidence: dict[str, float]
    taken: str


def settled(start: Start, session: Session) -> Start:
    """Decide what the training cases decide of a start: heads that are to be fitted, and the source.

    Of alternatives that is taken whose fitted heads have the highest evidence, the first of equals, with
    these heads. A start that is settled already is returned as it is.

    The decision is noted in the run's folder, as `start.safetensors`, before the first step; a run that goes
    on takes it from there, so that it has the heads and the source that it began with on any machine.

    Args:
        start: its model gets the heads in place.
        session: the first training.

    Raises:
        InputError: as for `fit_head`; the folder holds another run; of one that goes on, the note is missing
            or is of other candidates.
    """
    if start.taken or not (start.alternatives or start.fit_heads):
        return start
    candidates = start.alternatives or {OWN: start.model}
    folder, fabric = Path(session.folder), launch(session.settings)
    if not session.resume:
        refuse_begun(folder)
    with folder_lock(folder) if fabric.is_global_zero else nullcontext():
        if (folder / STATE_NAME).exists():
            decision = _read(folder / NOTE_NAME, candidates)
        else:
            decision = _decide(candidates, session)
            if fabric.is_global_zero:
                note = {"evidence": dict(decision.evidence), "taken": decision.taken}
                save_checkpoint(folder / NOTE_NAME, decision.head.tensors, kind=_KIND, **note)
    model = candidates[decision.taken]
    decision.head.put(model)
    return replace(start, model=model, evidence=decision.evidence, taken=decision.taken)


def _decide(candidates: Mapping[str, nn.Module], session: Session) -> _Decision:
    fits = {
        name: fit_head(_plain(model), session.data.train, session.settings)
        for name, model in candidates.items()
    }
    best = max(fits, key=lambda name: fits[name].evidence)
    return _Decision({name: found.evidence for name, found in fits.items()}, best, fits[best])


def _read(path: Path, candidates: Mapping[str, nn.Module]) -> _Decision:
    """Take the decision of a run that has begun.

    Raises:
        InputError: it is missing or is of other candidates.
    """
    if not path.is_file():
        raise InputError(
            f"{path}: expected the heads and the choice that the run began with (the file is missing); "
            f"remove {path.with_name(STATE_NAME)} to start the run again"
        )
    found = load_checkpoint(path, kind=_KIND)
    noted = {name: value for name, value in found.metadata.items() if name in ("evidence", "taken")}
    note = validated(_Note, noted, path)
    if note.evidence.keys() != candidates.keys() or note.taken not in candidates:
        raise InputError(
            f"{path}: expected a choice among {listed(candidates)} (got {note.taken} of "
            f"{listed(note.evidence)})"
        )
    parameters = named_parameters(_plain(candidates[note.taken]))
    unlike = [n for n, t in found.tensors.items() if n not in parameters or t.shape != parameters[n].shape]
    if unlike:
        raise InputError(f"{path}: expected heads of this network (got others: {listed(unlike)})")
    evidence = {name: note.evidence[name] for name in candidates}
    return _Decision(evidence, note.taken, FittedHead(found.tensors, evidence[note.taken]))


def _plain(model: nn.Module) -> nn.Module:
    return model.fold() if isinstance(model, MergedModel) else model
