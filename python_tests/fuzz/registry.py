"""The kinds of input that there are, and the folder their modules lie in."""

import enum
import functools
import importlib.util
import random
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

KINDS_FOLDER = Path(__file__).parent / "kinds"


class Outcome(enum.Enum):
    """What came of a case."""

    RIGHT = "right"
    SAME = "same"
    CLEAR = "clear"
    OTHER = "other"


Case = Callable[[random.Random, Path], Outcome]


@dataclass(frozen=True)
class Kind:
    """A kind of input and its bounds per case: processor time, and memory beyond what was resident."""

    name: str
    run: Case
    seconds: float
    megabytes: float


KINDS: dict[str, Kind] = {}


def kind(name: str, *, seconds: float = 10, megabytes: float = 500) -> Callable[[Case], Case]:
    """Enter a function into the table of kinds."""

    def enter(run: Case) -> Case:
        if name in KINDS:
            raise ValueError(f"two kinds are named {name}")
        KINDS[name] = Kind(name, run, seconds, megabytes)
        return run

    return enter


@functools.cache
def scratch() -> Path:
    """A folder that lasts as long as the process, for samples that are made once."""
    _KEPT.append(holder := tempfile.TemporaryDirectory(prefix="fuzz-samples-"))
    return Path(holder.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def load(folder: Path = KINDS_FOLDER) -> dict[str, str]:
    """Import every module of `folder`; return the tracebacks of those that cannot be imported, by name."""
    broken = {}
    for path in sorted(folder.glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"fuzz_kinds.{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        try:
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        except Exception:
            broken[path.stem] = traceback.format_exc()
    return broken
