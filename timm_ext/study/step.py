"""A step of a study: frozen settings, the steps it needs, and what it does with their folders.

A step is one piece of work that others can share: generating cases, training a source network, one
fine-tuning run. Its digest covers its settings and the digests of everything it needs, so that a folder is
either the answer to exactly this question or absent.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from timm_ext.errors import InputError

Inputs = Mapping[str, Path]
"""Role → folder of the step that is needed in it."""


@dataclass(frozen=True)
class Context:
    """What a step gets beside its inputs.

    Attributes:
        folder: where the step writes its files; files of an interrupted attempt may lie there.
        report: tells the runner how far the step is, from 0 to 1.
    """

    folder: Path
    report: Callable[[float], None]


class Step(BaseModel):
    """One cached piece of work; its own fields are all that decides the result beside the needed steps.

    Attributes:
        name: readable and unique in its study; the first half of the folder's name.
        needs: role → step; `run` gets role → folder of that step.
        cost: expected seconds, for the order of work and the time left.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: ClassVar[str] = "other work"
    """What steps of this type do, for readers."""

    name: str
    needs: dict[str, "Step"] = Field(default_factory=dict, exclude=True, repr=False)
    cost: float = Field(default=1.0, exclude=True, repr=False)

    def run(self, inputs: Inputs, context: Context) -> dict[str, Any]:
        """Do the work in a worker process and return the outcome, JSON that depends on nothing else."""
        raise NotImplementedError

    @cached_property
    def question(self) -> dict[str, Any]:
        """The type and all fields but needs and cost, as JSON values."""
        return {"type": type(self).__name__, **self.model_dump(mode="json")}

    @cached_property
    def digest(self) -> str:
        """Hash of the question and of the digests of the needed steps."""
        needs = {role: step.digest for role, step in self.needs.items()}
        return hashed({"step": self.question, "needs": needs})

    @property
    def folder_name(self) -> str:
        """`name-` and the first 12 digits of the digest."""
        return f"{self.name}-{self.digest[:12]}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Step) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


def hashed(value: Any) -> str:
    """Return the SHA-256 of JSON values."""
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def step_from(question: Mapping[str, Any], types: Sequence[type[Step]]) -> Step:
    """Make a step again from its question, without what it needs.

    Args:
        question: `Step.question`.
        types: all that it may be of.
    """
    fields = dict(question)
    table = {known.__name__: known for known in types}
    return table[fields.pop("type")].model_validate(fields)


def with_needs(steps: Iterable[Step]) -> list[Step]:
    """Return the steps and all they need, each once, needed ones first.

    Raises:
        InputError: two different steps share a name.
    """
    ordered: dict[Step, None] = {}
    names: dict[str, Step] = {}

    def visit(step: Step) -> None:
        if step in ordered:
            return
        if names.setdefault(step.name, step) != step:
            raise InputError(f"plan: expected one step per name (got two different steps named {step.name})")
        for needed in step.needs.values():
            visit(needed)
        ordered[step] = None

    for step in steps:
        visit(step)
    return list(ordered)
