"""Steps with frozen settings: their folders, named by a hash of those settings, and their records.

A step is one piece of work that others can share: generating cases, training a source network, one
fine-tuning run. Its hash covers its settings and the hashes of everything it needs, so that a folder is
either the answer to exactly this question or absent.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from timm_ext.documents import read_json, validated
from timm_ext.errors import InputError, listed, shown
from timm_ext.files import visible, write_json
from timm_ext.study.outcomes import Failure
from timm_ext.system.locks import LOCK_NAME, folder_lock
from timm_ext.training.settings import TrainSettings

RECORD = "record.json"
FAILURE = "failed.json"
PLAN = "plan.json"

Kind = TypeVar("Kind")


@dataclass(frozen=True, eq=False)
class Step:
    """One cached piece of work.

    Attributes:
        name: readable and unique in its plan; the first half of the folder's name.
        function: `"module:function"`, called as `function(settings, inputs, context)` in a worker process;
            what it returns is JSON and must depend on nothing but its arguments.
        settings: JSON values, all that decides the result.
        needs: role → step; the function gets role → folder of that step.
        cost: expected seconds, for the order of work and the time left.
    """

    name: str
    function: str
    settings: Mapping[str, Any]
    needs: Mapping[str, "Step"] = field(default_factory=dict)
    cost: float = 1.0

    @cached_property
    def digest(self) -> str:
        """Hash of the name, the function, the settings and the digests of the needed steps."""
        question = {
            "name": self.name,
            "function": self.function,
            "settings": self.settings,
            "needs": {role: step.digest for role, step in self.needs.items()},
        }
        text = json.dumps(question, sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def train(self) -> TrainSettings:
        """Return how a step that trains does it."""
        return TrainSettings(**self.settings["train"])

    @property
    def folder_name(self) -> str:
        """`name-` and the first 12 digits of the digest."""
        return f"{self.name}-{self.digest[:12]}"


@dataclass(frozen=True)
class Record:
    """What is noted of a finished step.

    Attributes:
        name: of the step.
        digest: of the step.
        result: what its function returned.
        seconds: that it took.
        checksum: over all of the record; records of early versions have none.
    """

    name: str
    digest: str
    result: dict[str, Any]
    seconds: float = 0.0
    checksum: str | None = None


def read_record(path: Path, digest: str | None = None) -> Record:
    """Read the record of a finished step.

    Args:
        path: of the record.
        digest: of the step that it must belong to; None takes any.

    Raises:
        InputError: no record, one that was altered, or one of other settings.
    """
    values = read_json(path)
    record = validated(Record, values, path, strict=True)
    if digest is not None and record.digest != digest:
        raise InputError(f"{path}: expected the record of {digest} (got {shown(record.digest)}); remove it")
    if record.checksum is not None:
        rest = {name: value for name, value in values.items() if name != "checksum"}
        if _checksum(rest) != record.checksum:
            raise InputError(
                f"{path}: expected a record as it was written (got one that was altered); remove it"
            )
    return record


def _checksum(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True, allow_nan=False).encode()).hexdigest()


def with_needs(steps: Iterable[Step]) -> list[Step]:
    """Return the steps and all they need, each once, needed ones first.

    Raises:
        InputError: two different steps share a name.
    """
    ordered: dict[str, Step] = {}
    names: dict[str, str] = {}

    def visit(step: Step) -> None:
        if step.digest in ordered:
            return
        if step.name in names:
            raise InputError(f"plan: expected one step per name (got two different steps named {step.name})")
        names[step.name] = step.digest
        for needed in step.needs.values():
            visit(needed)
        ordered[step.digest] = step

    for step in steps:
        visit(step)
    return list(ordered.values())


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

    def outcome(self, step: Step, kind: type[Kind]) -> Kind:
        """Return what a finished step's function returned, as a type of `timm_ext.study.outcomes`.

        Raises:
            InputError: the step is not finished, or its record holds something else.
        """
        record = self.record(step)
        if record is None:
            raise InputError(f"{self.run_path(step)}: expected a finished step (got no {RECORD})")
        return validated(kind, record.result, self.run_path(step) / RECORD, strict=True)

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

    def write_record(self, step: Step, result: Mapping[str, Any], **facts: Any) -> None:
        """Write the step's record, atomically; from now on the step counts as finished."""
        record = {
            "name": step.name,
            "digest": step.digest,
            "function": step.function,
            "settings": step.settings,
            "needs": {role: needed.folder_name for role, needed in step.needs.items()},
            "result": result,
            **facts,
        }
        as_read = json.loads(json.dumps(record, allow_nan=False))
        write_json(self.run_path(step) / RECORD, {**as_read, "checksum": _checksum(as_read)})

    def lock(self) -> AbstractContextManager[None]:
        """Hold the folder for this process; see `timm_ext.system.locks.folder_lock`."""
        return folder_lock(self.path)

    def claim(self, settings: Mapping[str, Any], *, extendable: Iterable[str] = ()) -> None:
        """Write the plan's settings, or check them against those of the run that is continued here.

        Args:
            settings: JSON values that describe the whole plan.
            extendable: fields that may differ from the earlier run: their steps do not disturb each other.

        Raises:
            InputError: the folder holds something else, or results of other settings.
        """
        plan = self.path / PLAN
        if plan.exists():
            earlier = validated(dict[str, Any], read_json(plan), plan)
            differing = [
                f"{name} {shown(repr(earlier.get(name)))} there, {shown(repr(settings.get(name)))} here"
                for name in sorted({*earlier, *settings} - {*extendable})
                if earlier.get(name) != json.loads(json.dumps(settings.get(name)))
            ]
            if differing:
                listing = listed(differing, separator="; ")
                raise InputError(
                    f"{self.path}: holds results of other settings ({listing}); choose another folder"
                )
        elif self.path.exists() and (
            others := sorted(p.name for p in visible(self.path) if p.name != LOCK_NAME)
        ):
            raise InputError(
                f"{self.path}: expected a new, empty or earlier run's folder (got {others[0]} in it)"
            )
        write_json(plan, settings)
