"""The time left of a study, on the terminal and in lines."""

import io
import time

import pytest
from rich.console import Console

from timm_ext.study.bars import TimeLeft, step_bars
from timm_ext.study.records import Folder
from timm_ext.study.runner import Event
from timm_ext.study.step import Step


class Work(Step):
    number: int


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def work(*costs):
    return [Work(name=f"work-{number}", number=number, cost=cost) for number, cost in enumerate(costs)]


def done(step, seconds):
    return Event("done", step, seconds=seconds)


def test_the_time_left_begins_with_the_estimate_and_comes_to_what_was_measured(clock):
    steps = work(*[1.0] * 100)
    left = TimeLeft(steps, workers=2)
    assert left.seconds == 50
    clock[0] = 30.0  # the start of workers
    left.hear(Event("started", steps[0]))
    assert left.seconds == 50
    for step in steps[:50]:
        left.hear(done(step, 3.0))
    assert left.seconds == pytest.approx(25 * (10 + 150) / (10 + 50))
    for step in steps[50:96]:
        left.hear(done(step, 3.0))
    assert left.seconds == pytest.approx(2 * 3, rel=0.1)


def test_steps_that_are_nearly_free_do_not_decide(clock):
    steps = work(0.001, 0.001, 20.0, 26.0)
    left = TimeLeft(steps, workers=2)
    before = left.seconds
    left.hear(done(steps[0], 0.5))
    assert before < left.seconds < 1.2 * before


def test_a_long_step_is_measured_from_its_first_news(clock):
    (step,) = work(100.0)
    left = TimeLeft([step], workers=4)
    left.hear(Event("started", step))
    clock[0] = 20.0
    left.hear(Event("advanced", step, fraction=0.2))
    assert left.seconds == 80  # one step keeps one worker busy
    clock[0] = 140.0
    left.hear(Event("advanced", step, fraction=0.8))
    assert left.seconds == pytest.approx(20 * (10 + 120) / (10 + 60))


def test_lines_tell_the_time_left_and_nothing_at_the_end(tmp_path, clock):
    steps, out = work(30.0, 30.0, 60.0), io.StringIO()
    with step_bars(steps, Folder(tmp_path), Console(file=out, width=200), workers=1) as hear:
        for step in steps:
            hear(Event("started", step))
            hear(done(step, step.cost))
    lines = [line for line in out.getvalue().splitlines() if "work-" in line]
    assert lines == [
        "1/3 work-0 (30.0 s), about 90 s left",
        "2/3 work-1 (30.0 s), about 60 s left",
        "3/3 work-2 (60.0 s)",
    ]


def test_the_bar_names_what_is_left(tmp_path, clock):
    steps, out = work(60.0, 60.0), io.StringIO()
    console = Console(file=out, width=200, force_terminal=True)
    with step_bars(steps, Folder(tmp_path), console, workers=1) as hear:
        hear(done(steps[0], 60.0))
    assert "0:00:00, left 0:01:00" in out.getvalue()
