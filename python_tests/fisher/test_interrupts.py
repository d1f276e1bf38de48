"""Ctrl-C at any line: an example counts once or not at all, or the accumulator says that it is broken."""

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import timm_ext.fisher
from timm_ext.errors import InputError
from timm_ext.fisher import FisherAccumulator, estimate_fisher, micro_batch

OWN = str(Path(timm_ext.fisher.__file__).parent)


class Interrupt:
    """Raises KeyboardInterrupt right before the n-th line of the package that runs inside the block."""

    def __init__(self, line: int) -> None:
        self.left = line

    def __enter__(self) -> "Interrupt":
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        if not frame.f_code.co_filename.startswith(OWN):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self._trace


class Net(nn.Module):
    """Parameters with a rule, without one, and unused; examples go one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.ones(3))
        self.spare = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.scale * self.first(x).relu())


X, IDS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), list("abcd")


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def lines_of(call: Callable[[], object]) -> int:
    with Interrupt(0) as counter:
        call()
    return -counter.left


def fresh(model: nn.Module) -> FisherAccumulator:
    return FisherAccumulator(model, micro_batch=2)


def update(accumulator: FisherAccumulator, places: list[int]) -> None:
    accumulator.update(X[places], None, [IDS[n] for n in places])


@pytest.mark.filterwarnings("ignore:Fisher")
def test_an_update_is_whole_or_refused(model: nn.Module) -> None:
    """An interrupted update is made up for by the examples that are missing, unless the sums were torn."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    accumulator = fresh(model)
    with accumulator:
        lines = lines_of(lambda: update(accumulator, [0, 1, 2, 3]))
    expected = accumulator.result().tensors
    assert lines > 200
    outcomes = {"broken": 0, "whole": 0}
    for line in range(1, lines + 1):
        accumulator = fresh(model)
        with accumulator:
            with Interrupt(line), pytest.raises(KeyboardInterrupt):
                update(accumulator, [0, 1, 2, 3])
            assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()), line
            if accumulator.broken:
                outcomes["broken"] += 1
                with pytest.raises(InputError, match="failed half-way"):
                    update(accumulator, [0])
                for refused in (accumulator.partial, accumulator.result):
                    with pytest.raises(InputError, match="failed half-way"):
                        refused()
                continue
            seen = accumulator.partial().ids
            assert list(seen) == IDS[: len(seen)], line
            if left := [n for n in range(4) if IDS[n] not in seen]:
                update(accumulator, left)
        outcomes["whole"] += 1
        fisher = accumulator.result()
        assert fisher.count == 4
        for name, tensor in fisher.tensors.items():
            assert torch.equal(tensor, expected[name]), (line, name)
    assert min(outcomes.values()) > 20


@pytest.mark.filterwarnings("ignore:Fisher")
def test_an_estimate_goes_on_after_an_interrupt_at_any_line(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also within a batch, and while the sums are written or read again."""
    monkeypatch.setattr(micro_batch, "examples_at_a_time", lambda x, parameters: 1)
    data = [(X, None, IDS)]
    path = tmp_path / "partial"

    def estimate() -> timm_ext.fisher.Fisher:
        return estimate_fisher(model, data, partial=path, save_every=1e9)

    expected = estimate_fisher(model, data).tensors
    lines = lines_of(estimate)
    path.unlink(missing_ok=True)
    for line in range(1, lines + 1, 7):
        with Interrupt(line), pytest.raises(KeyboardInterrupt):
            estimate()
        with Interrupt(line // 2), suppress(KeyboardInterrupt):
            estimate()
        fisher = estimate()
        assert fisher.count == 4
        for name, tensor in fisher.tensors.items():
            assert torch.equal(tensor, expected[name]), (line, name)
        path.unlink(missing_ok=True)


def test_an_accumulator_whose_restoring_was_interrupted_is_broken(model: nn.Module) -> None:
    source = fresh(model)
    with source:
        update(source, [0, 1])
    partial = source.partial()
    whole = fresh(model)
    lines = lines_of(lambda: whole.restore(partial))
    for line in range(1, lines + 1):
        accumulator = fresh(model)
        with pytest.raises(KeyboardInterrupt), Interrupt(line):
            accumulator.restore(partial)
        if not accumulator.broken:
            assert accumulator.partial().ids in ((), ("a", "b"))
            sums = accumulator.partial().sums.values()
            assert any(bool(total.any()) for total in sums) == bool(accumulator.partial().ids)
