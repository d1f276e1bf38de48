"""The content of a run's state: its fields, and how they are checked before any of them is used."""

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, model_validator
from torch import Tensor
from torch.optim import Optimizer

from timm_ext.errors import InputError, listed, shown
from timm_ext.training.log import Row

_OF_ADAM = {"step", "exp_avg", "exp_avg_sq"}


def _plain(tensor: Tensor) -> Tensor:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise ValueError("expected a dense tensor")
    return tensor


Count = Annotated[int, Field(ge=0)]
PlainTensor = Annotated[Tensor, AfterValidator(_plain)]
Tensors = dict[str, PlainTensor]
Facts = dict[str, JsonValue]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False
    )


class SavedSchedule(_Part):
    """The lowest loss if there is one, and the validations since then and since the rate was halved."""

    best: float | None
    since_best: Count
    since_halved: Count


class SavedBest(_Part):
    """The weights of the lowest validation loss, and their step."""

    step: Count
    weights: Tensors


class SavedAdam(_Part):
    """`state_dict` of the optimizer."""

    state: dict[Count, Tensors]
    param_groups: list[dict[str, Any]]


class SavedLog(_Part):
    """How many bytes of `log.csv` belong to the state, and their SHA-256."""

    length: Annotated[int, Field(ge=1)]
    sha256: Digest


class SavedData(_Part):
    """What the training and the validation set were; see `identity_of`."""

    training: Facts
    validation: Facts | None


class SavedTraining(_Part):
    """All that the next step of a run depends on; see `History` for what is observed and timed.

    Attributes:
        facts: other values than settings that it depends on.
        frozen: `frozen_digest` of the model.
        step: steps taken.
        row: of the step whose validation and log are still to be done, if there is one.
        weights: that change in training.
        scaler: of the precision.
        round_losses: of the steps since the last validation.
        start: of the weights that are tied.
        precision: of those that are held by one.
        average: of the weights; empty where none is kept.
    """

    settings: Facts
    facts: Facts
    data: SavedData
    frozen: Digest
    step: Count
    row: dict[str, int | float | None] | None
    log: SavedLog
    weights: Tensors
    optimizer: SavedAdam
    scaler: dict[str, int | float]
    schedule: SavedSchedule
    best: SavedBest | None
    round_losses: list[float]
    observations: list[tuple[Count, PlainTensor]]
    seconds: Annotated[float, Field(ge=0)]
    times: list[tuple[Count, Annotated[float, Field(ge=0)]]]
    start: Tensors
    precision: Tensors = {}
    average: Tensors = {}

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "SavedTraining":
        step = self.step
        if self.best is not None and not 0 < self.best.step <= step:
            raise ValueError(f"the best weights are of step {self.best.step} of {step}")
        if max(len(self.round_losses), self.schedule.since_best, self.schedule.since_halved) > step:
            raise ValueError(f"more losses and validations than the {step} steps")
        for name, steps in (("observations", self.observations), ("times", self.times)):
            found = [point for point, _ in steps]
            if found != sorted(found) or any(point > step for point in found):
                raise ValueError(f"{name} at other steps than 0 to {step}")
        if self.row is not None and self.row.get("loss") is None:
            raise ValueError("the last step has no loss")
        return self


def check_adam(saved: SavedAdam, optimizer: Optimizer, step: int, where: object) -> None:
    """Compare a saved optimizer with one of the same run.

    Raises:
        InputError: it has other groups, options or tensors, or numbers that Adam cannot have.
    """
    for problem in [*_wrong_groups(saved, optimizer), *_wrong_moments(saved, optimizer, step)]:
        raise InputError(f"{where}: expected the optimizer of the run ({problem})")


def _wrong_groups(saved: SavedAdam, optimizer: Optimizer) -> Iterator[str]:
    expected = optimizer.state_dict()["param_groups"]
    if len(saved.param_groups) != len(expected):
        yield f"{len(saved.param_groups)} groups of parameters, now {len(expected)}"
        return
    for found, own in zip(saved.param_groups, expected, strict=True):
        if found.keys() != own.keys():
            yield f"other options in group {own['name']}"
            continue
        for name, value in own.items():
            got = found[name]
            if name == "lr":
                if type(got) not in (int, float) or not 0 <= got < math.inf:
                    yield f"the rate {shown(got)} in group {own['name']}"
            elif type(got) is not type(value) or repr(got) != repr(value):
                yield f"{name} {shown(got)} in group {own['name']}, now {shown(value)}"


def _wrong_moments(saved: SavedAdam, optimizer: Optimizer, step: int) -> Iterator[str]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, state in saved.state.items():
        if index >= len(parameters) or state.keys() != _OF_ADAM:
            yield f"other tensors for parameter {index} of {len(parameters)}"
            continue
        like, count = parameters[index], state["step"]
        if count.shape != () or not count.is_floating_point() or not 0 < float(count) <= step:
            yield f"a wrong number of steps for parameter {index}"
        for name in ("exp_avg", "exp_avg_sq"):
            moment = state[name]
            if moment.shape != like.shape or moment.dtype != like.dtype or not bool(moment.isfinite().all()):
                yield f"{name} of parameter {index} is not {list(like.shape)} of finite numbers"
            elif name == "exp_avg_sq" and bool((moment < 0).any()):
                yield f"{name} of parameter {index} is negative"


def check_data(saved: SavedData, own: Mapping[str, Facts | None], where: object) -> None:
    """Refuse to go on with other cases, in the `training` and the `validation` set, than a run began with.

    Raises:
        InputError: what differs is named: cases, their order, their content, or how they become samples.
    """
    both = [(name, then or {}, own[name] or {}) for name, then in saved]
    counts, now = [then.get("count", 0) for _, then, _ in both], [here.get("count", 0) for *_, here in both]
    changes = [f"{name} set: {change}" for name, then, here in both for change in _changes(then, here)]
    if counts != now:
        detail = f": {listed(changes, separator='; ')}" if changes else ""
        raise InputError(
            f"{where}: expected {counts} training and validation cases, as before the interruption "
            f"(got {now}{detail})"
        )
    if changes:
        raise InputError(
            f"{where}: expected the data of before the interruption (got {listed(changes, separator='; ')})"
        )


def _changes(then: Facts, now: Facts) -> Iterator[str]:
    """Say in what two data sets differ."""
    before, after = _digests(then), _digests(now)
    if gone := [name for name in before if name not in after]:
        yield f"without {listed(gone)}"
    if new := [name for name in after if name not in before]:
        yield f"with {listed(new)}"
    if changed := [name for name in after if name in before and before[name] != after[name]]:
        yield f"other images, labels or preparation in {listed(changed)}"
    if not (gone or new or changed) and then.get("cases") != now.get("cases"):
        yield "the cases in another order"
    for name in sorted((then.keys() | now.keys()) - {"cases", "count"}):
        if then.get(name) != now.get(name):
            yield f"{name} {shown(now.get(name))}, before {shown(then.get(name))}"


def _digests(identity: Facts) -> dict[str, list[Any]]:
    """Return the digests by case; one name may stand for several cases."""
    found: dict[str, list[Any]] = {}
    cases = identity.get("cases")
    for pair in cases if isinstance(cases, list) else []:
        if isinstance(pair, list) and len(pair) == 2:
            found.setdefault(str(pair[0]), []).append(pair[1])
    return found


def check_rows(rows: list[Row], saved: SavedTraining, where: object) -> None:
    """Compare a log with the state it belongs to.

    Raises:
        InputError: it has other steps.
    """
    expected = saved.step - (saved.row is not None)
    if [row["step"] for row in rows] != list(range(1, expected + 1)):
        raise InputError(f"{where}: expected the rows of the steps 1 to {expected} (got {len(rows)} others)")
