"""What the steps of a study leave: their files, and what they note in their records, as far as it is read."""

from dataclasses import dataclass

NETWORK = "network.safetensors"
INITIAL = "initial.safetensors"
FISHER = "fisher.safetensors"
LABELS = "labels.json"
CASES, CACHE, TRAINING, PREDICTIONS = "cases", "prepared", "training", "predictions"
TIMES = "times.json"

Scores = dict[str, dict[str, float | None]]
"""Case → region → score; None where it is undefined."""


@dataclass(frozen=True)
class Cases:
    """Of a step that provides cases: their ids."""

    cases: tuple[str, ...]


@dataclass(frozen=True)
class Training:
    """Of any training: (step, mean validation Dice), how many steps it took, and which was best."""

    curve: tuple[tuple[int, float], ...]
    steps: int
    best_step: int | None = None


@dataclass(frozen=True)
class Learned(Training):
    """Of an adaptation that learned ratios `[layers, sources]`."""

    ratios: tuple[tuple[float, ...], ...] = ()
    layers: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Scored(Training):
    """Of a run: Dice and, in mm, HD95 of every test case and region."""

    scores: Scores
    hd95: Scores


@dataclass(frozen=True)
class Forgetting:
    """Initialisation → source task → Dice."""

    dice: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Times:
    """Of a training: seconds in all, and (step, seconds so far) at every validation."""

    seconds: float
    validations: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Failure:
    """Why a step failed."""

    message: str
