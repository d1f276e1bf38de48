"""The process that runs cases: reads {"kind", "seed", "case"} line by line, answers each with its outcome."""

import contextlib
import faulthandler
import json
import os
import random
import resource
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from . import registry
from .registry import KINDS, Kind, Outcome

MOST_LINES = 12
MOST_CHARACTERS = 4000
HARD_LIMIT = 3 << 30  # bytes that a case may ask for before the allocation itself fails


def main(folder: Path) -> None:
    """Load the kinds of `folder`, tell their names and bounds, and run what is asked for."""
    faulthandler.enable()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a case prints goes to the log of this process
    broken = registry.load(folder)
    kinds = {kind.name: kind.seconds for kind in KINDS.values()}
    print(json.dumps({"kinds": kinds, "broken": broken}), file=answers, flush=True)
    _bound_memory()
    for line in sys.stdin:
        request = json.loads(line)
        answer = _run(KINDS[request["kind"]], request["seed"], request["case"])
        print(json.dumps(answer), file=answers, flush=True)


def _run(kind: Kind, seed: int, case: int) -> dict[str, Any]:
    rng = random.Random(f"{seed}/{kind.name}/{case}")
    before = _start_of_peak()
    started = time.process_time()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        outcome, detail = _outcome(kind, rng, Path(folder))
    seconds = time.process_time() - started
    megabytes = (_kilobytes("VmHWM") - before) / 1024
    if seconds > kind.seconds:
        outcome, detail = (
            Outcome.OTHER,
            f"{seconds:.1f} s of processor time (at most {kind.seconds:g}); {detail}",
        )
    elif megabytes > kind.megabytes:
        outcome, detail = (
            Outcome.OTHER,
            f"{megabytes:.0f} MB of memory (at most {kind.megabytes:g}); {detail}",
        )
    return {"outcome": outcome.value, "detail": detail}


def _outcome(kind: Kind, rng: random.Random, folder: Path) -> tuple[Outcome, str]:
    from timm_ext.errors import InputError

    try:
        outcome = kind.run(rng, folder)
    except InputError as error:
        fault = _fault_of_message(str(error))
        return (Outcome.OTHER, f"{fault}: {str(error)[:2000]!r}") if fault else (Outcome.CLEAR, str(error))
    except (KeyboardInterrupt, SystemExit) as error:
        return Outcome.OTHER, repr(error)
    except BaseException:
        return Outcome.OTHER, traceback.format_exc(limit=-4)[-3000:]
    return outcome, ""


def _fault_of_message(message: str) -> str:
    first, *rest = message.split("\n") or [""]
    if not first.strip():
        return "an empty message"
    if len(message) > MOST_CHARACTERS:
        return f"a message of {len(message)} characters"
    if len(rest) >= MOST_LINES or any(not line.startswith("  ") for line in rest):
        return "a message of several lines"
    if any(not character.isprintable() for character in message.replace("\n", "")):
        return "control characters in a message"
    foreign = ("Traceback", "errors.pydantic.dev", "validation error for", "torch_call_dispatcher")
    return next((f"a message with {word!r}" for word in foreign if word in message), "")


def _bound_memory() -> None:
    with contextlib.suppress(ValueError, OSError):
        limit = _kilobytes("VmData") * 1024 + HARD_LIMIT
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _start_of_peak() -> int:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _kilobytes("VmRSS")


def _kilobytes(name: str) -> int:
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="utf-8") as file:
        return next((int(line.split()[1]) for line in file if line.startswith(f"{name}:")), 0)
    return 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
