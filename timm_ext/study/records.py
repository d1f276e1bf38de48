"""The folder of a study: its plan, a lock, and for each step a folder with the record of its outcome."""

import json
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from timm_ext.documents import read_json, validated
from timm_ext.errors import InputError, listed, shown
from timm_ext.files import visible, write_json
from timm_ext.study.outcomes import Failure
from timm_ext.study.step import Step, hashed, with_needs
from timm_ext.system.locks import LOCK_NAME, folder_lock

RECORD = "record.json"
FAILURE = "failed.json"
PLAN = "plan.json"
FORMAT = 3
"""Of the folder; counts the changes after which older folders cannot be gone on with."""

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Record:
    """What is noted of a finished step: what its `run` returned, in which time, and a checksum of it all."""

    name: str
    digest: str
    outcome: dict[str, Any]
    checksum: str
    seconds: float = 0.0


def read_record(path: Path, digest: str | None = None) -> Record:
    """Read the record of a finished step, of any or of the one with this digest.

    Raises:
        InputError: no record, one that was altered, or one of other settings.
    """
    values = read_json(path)
    record = validated(Record, values, path, strict=True)
    if digest is not None and record.digest != digest:
        raise InputError(f"{path}: expected the record of {digest} (got {shown(record.digest)}); remove it")
    if hashed({name: value for name, value in values.items() if name != "checksum"}) != record.checksum:
        raise InputError(f"{path}: expected a record as it was written (got one that was altered); remove it")
    return record


class Folder:
    """The folder of a study: `plan.json`, a lock, and one folder per step under `runs/`."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def run_path(self, step: Step) -> Path:
        """Return the step's folder, which need not exist."""
        return self.path / "runs" / step.folder_name

    def record(self, step: Step) -> Record | None:
        """Return the record of a finished step, None when it is not finished.

        Raises:
            InputError: the record is damaged or belongs to other settings.
        """
        path = self.run_path(step) / RECORD
        return read_record(path, step.digest) if path.exists() else None

    def pending(self, steps: Iterable[Step]) -> list[Step]:
        """Return those of the steps and of all they need that are not finished, needed ones first."""
        return [step for step in with_needs(steps) if self.record(step) is None]

    def outcome(self, step: Step, kind: type[Kind]) -> Kind:
        """Return the outcome of a finished step as a type of `timm_ext.study.outcomes`.

        Raises:
            InputError: the step is not finished, or its record holds something else.
        """
        record = self.record(step)
        if record is None:
            raise InputError(f"{self.run_path(step)}: expected a finished step (got no {RECORD})")
        return validated(kind, record.outcome, self.run_path(step) / RECORD, strict=True)

    def notes(self, step: Step, name: str, kind: type[Kind]) -> Kind | None:
        """Return a JSON file that a step wrote beside its record, None where there is none.

        Raises:
            InputError: the file holds something else.
        """
        path = self.run_path(step) / name
        return validated(kind, read_json(path), path, strict=True) if path.exists() else None

    def failure(self, step: Step) -> str | None:
        """Return why a step failed the last time, None where it did not."""
        failed = self.notes(step, FAILURE, Failure)
        return None if failed is None else failed.message

    def write_failure(self, step: Step, message: str) -> None:
        """Note that a step failed; its record or `forget_failure` takes that back."""
        write_json(self.run_path(step) / FAILURE, {"name": step.name, "message": message})

    def forget_failure(self, step: Step) -> None:
        """Take back that a step failed."""
        (self.run_path(step) / FAILURE).unlink(missing_ok=True)

    def write_record(self, step: Step, outcome: Mapping[str, Any], **facts: Any) -> None:
        """Write the step's record, atomically; from now on the step counts as finished."""
        record = {
            "name": step.name,
            "digest": step.digest,
            "step": step.question,
            "needs": {role: needed.folder_name for role, needed in step.needs.items()},
            "outcome": outcome,
            **facts,
        }
        as_read = json.loads(json.dumps(record, allow_nan=False))
        write_json(self.run_path(step) / RECORD, {**as_read, "checksum": hashed(as_read)})

    def lock(self) -> AbstractContextManager[None]:
        """Hold the folder for this process; see `timm_ext.system.locks.folder_lock`."""
        return folder_lock(self.path)

    def claim(self, plan: Mapping[str, Any], *, extendable: Iterable[str] = ()) -> None:
        """Write the plan, or check it against that of the study that is continued here.

        Args:
            plan: JSON values.
            extendable: fields that may differ from the earlier start: their steps do not disturb each other.

        Raises:
            InputError: the folder holds something else, or a study of another plan or of another format.
        """
        path, now = self.path / PLAN, {"format": FORMAT, **plan}
        if path.exists():
            self._compare(validated(dict[str, Any], read_json(path), path), now, {*extendable})
        elif self.path.exists() and (
            others := sorted(p.name for p in visible(self.path) if p.name != LOCK_NAME)
        ):
            raise InputError(
                f"{self.path}: expected a new, empty or earlier run's folder (got {others[0]} in it)"
            )
        write_json(path, now)

    def _compare(self, earlier: Mapping[str, Any], now: Mapping[str, Any], extendable: set[str]) -> None:
        if earlier.get("format") != FORMAT:
            raise InputError(
                f"{self.path}: expected a study of format {FORMAT} (got format "
                f"{shown(earlier.get('format', 1))}, of another version of timm_ext); choose another folder"
            )
        differing = [
            f"{name} {shown(repr(earlier.get(name)))} there, {shown(repr(now.get(name)))} here"
            for name in sorted({*earlier, *now} - extendable)
            if earlier.get(name) != json.loads(json.dumps(now.get(name)))
        ]
        if differing:
            listing = listed(differing, separator="; ")
            raise InputError(
                f"{self.path}: holds results of other settings ({listing}); choose another folder"
            )
