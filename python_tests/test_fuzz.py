"""The fuzz harness tells right from wrong, and finds nothing wrong in the package."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import mutate, registry, supervisor
from fuzz.registry import Outcome

ROOT = Path(__file__).parent.parent

PLANTED = """
import ctypes, os, time
from fuzz import Outcome, kind
from timm_ext.errors import InputError

@kind("right")
def right(rng, folder):
    (folder / "a").write_text("a")
    return Outcome.RIGHT

@kind("same")
def same(rng, folder):
    assert not list(folder.iterdir())
    return Outcome.SAME

@kind("clear")
def clear(rng, folder):
    raise InputError("field: expected 1 (got 2)\\n  here\\n  and 3 more")

@kind("wrong result")
def wrong(rng, folder):
    assert 1 + 1 == 3

@kind("another exception")
def exception(rng, folder):
    raise KeyError("settings")

@kind("exit")
def leaves(rng, folder):
    raise SystemExit(2)

@kind("crash")
def crash(rng, folder):
    ctypes.string_at(0)

@kind("silent end")
def silent(rng, folder):
    os._exit(0)

@kind("busy", seconds=0.2)
def busy(rng, folder):
    end = time.process_time() + 0.5
    while time.process_time() < end:
        pass
    return Outcome.RIGHT

@kind("hang", seconds=0.01)
def hang(rng, folder):
    time.sleep(3600)

@kind("memory", megabytes=50)
def memory(rng, folder):
    bytearray(b"x" * (100 << 20))
    return Outcome.RIGHT

@kind("colours")
def colours(rng, folder):
    error = InputError("id")
    error.args = ("id \\x1b[31m: expected a name",)
    raise error

@kind("report of a library")
def report(rng, folder):
    raise InputError("1 validation error for Plan\\nx\\n  Field required")

@kind("drawn")
def drawn(rng, folder):
    raise KeyError(rng.random())
"""
RIGHT = {"right": Outcome.RIGHT, "same": Outcome.SAME, "clear": Outcome.CLEAR}


@pytest.mark.slow
def test_random_damage_gives_what_is_right_or_one_clear_error():
    """A minute in all; `python -m python_tests.fuzz --seconds 3600` looks longer."""
    report = supervisor.run(seconds=60, seed=0)
    print(report.table())
    assert min(counted.tried for counted in report.counts.values()) > 0
    assert not report.faults, "\n\n".join([*report.faults[:10], report.table()])


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    (folder / "planted.py").write_text(PLANTED)
    (folder / "broken.py").write_text("import nothing_of_this_name")
    return folder


@pytest.mark.slow
def test_the_harness_finds_every_planted_fault(planted):
    report = supervisor.run(count=1, seed=3, folder=planted)
    assert len(report.counts) == 14
    for name, counted in report.counts.items():
        expected = RIGHT.get(name, Outcome.OTHER)
        assert counted.tried == 1
        assert counted.outcomes[expected] == 1, name
    assert sum("cannot be loaded" in fault for fault in report.faults) == 1
    assert len(report.faults) == 1 + (14 - len(RIGHT))
    assert any("Segmentation fault" in fault for fault in report.faults)


def test_a_case_is_repeated_by_the_command_that_the_report_prints(planted):
    command = [sys.executable, "-m", "python_tests.fuzz", "--kinds", str(planted)]
    result = subprocess.run(
        [*command, "--only", "drawn", "right", "--seed", "3", "--first", "1", "--count", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    again = supervisor.run(count=1, first=1, seed=3, only=["drawn"], folder=planted)
    other = supervisor.run(count=1, first=0, seed=3, only=["drawn"], folder=planted)
    assert again.faults[0] in result.stdout
    assert other.faults[0].splitlines()[-1] not in result.stdout
    assert "--only drawn --seed 3 --first 1 --count 1" in again.faults[0]


def test_a_run_without_a_fault_ends_with_status_0(planted, monkeypatch, capsys):
    from fuzz.__main__ import main

    monkeypatch.setattr(
        sys, "argv", ["fuzz", "--kinds", str(planted), "--only", "right", "clear", "--seconds", "1"]
    )
    assert main() == 0
    assert "right" in capsys.readouterr().out


def test_damage_is_drawn_from_the_generator():
    tree = {"a": [1, 2, {"b": "c"}], "d": {"e": 1.5}}
    trees = [repr(mutate.damaged_tree(random.Random(seed), tree)) for seed in range(50)]
    assert trees == [repr(mutate.damaged_tree(random.Random(seed), tree)) for seed in range(50)]
    assert len(set(trees)) > 30
    assert tree == {"a": [1, 2, {"b": "c"}], "d": {"e": 1.5}}
    data = bytes(range(256))
    assert all(mutate.damaged(random.Random(seed), data) is not data for seed in range(50))


def test_two_kinds_cannot_share_a_name(monkeypatch):
    monkeypatch.setattr(registry, "KINDS", {})
    registry.kind("a")(lambda rng, folder: Outcome.RIGHT)
    with pytest.raises(ValueError, match="two kinds are named a"):
        registry.kind("a")(lambda rng, folder: Outcome.RIGHT)
