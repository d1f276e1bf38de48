import importlib
import os
import signal
import subprocess
import sys
import time

import pytest

from timm_ext.errors import InputError
from timm_ext.study import runner
from timm_ext.study.records import Folder

WORK = """
import os, signal, time
from pathlib import Path
import torch
from timm_ext.errors import InputError
from timm_ext.documents import read_json
from timm_ext.study.step import Step

class Double(Step):
    value: int
    sleep: float = 0.0

    def run(self, inputs, context):
        context.report(0.5)
        with open(context.folder / "calls.txt", "a") as calls:
            calls.write("x")
        time.sleep(self.sleep)
        value = self.value
        for folder in inputs.values():
            value += read_json(folder / "record.json")["outcome"]["value"]
        return {"value": 2 * value}

class Threads(Step):
    def run(self, inputs, context):
        return {"threads": torch.get_num_threads()}

class Place(Step):
    def run(self, inputs, context):
        names = ("CUDA_VISIBLE_DEVICES", "RANK", "TORCHELASTIC_RUN_ID")
        return {name: os.environ.get(name) for name in names}

class Refuse(Step):
    def run(self, inputs, context):
        raise InputError("cases: expected 3 (got 2)")

class Crash(Step):
    def run(self, inputs, context):
        raise KeyError("lost")

class Die(Step):
    def run(self, inputs, context):
        os.kill(os.getpid(), signal.SIGKILL)

TYPES = (Double, Threads, Place, Refuse, Crash, Die)
"""


@pytest.fixture(autouse=True)
def work_module(tmp_path, monkeypatch):
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "study_work.py").write_text(WORK)
    monkeypatch.syspath_prepend(modules)
    monkeypatch.delitem(sys.modules, "study_work", raising=False)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(modules), os.getcwd(), os.environ.get("PYTHONPATH", "")])
    )
    return modules


def work():
    return importlib.import_module("study_work")


def run_steps(steps, folder, **options):
    return runner.run_steps(steps, folder, types=work().TYPES, **options)


def double(name, value, needs=None, **fields):
    return work().Double(name=name, value=value, needs=needs or {}, **fields)


def diamond(**settings):
    base = double("base", 1, **settings)
    left = double("left", 10, {"base": base}, **settings)
    right = double("right", 100, {"base": base}, **settings)
    return base, left, right, double("top", 0, {"left": left, "right": right}, **settings)


def calls(folder, step):
    return len((folder.run_path(step) / "calls.txt").read_text())


def test_shared_steps_run_once_and_results_flow(tmp_path):
    folder = Folder(tmp_path / "study")
    base, left, right, top = diamond()
    events = []
    assert run_steps([top], folder, workers=2, listener=events.append).complete
    assert folder.outcome(top, dict) == {"value": 2 * (2 * (2 + 10) + 2 * (2 + 100))}
    assert [calls(folder, step) for step in (base, left, right, top)] == [1, 1, 1, 1]
    assert next(e.step.name for e in events if e.kind == "done") == "base"
    assert run_steps([top], folder, workers=2).complete
    assert calls(folder, top) == 1


def test_a_failure_is_told_and_the_rest_goes_on(tmp_path):
    folder = Folder(tmp_path / "study")
    refused = work().Refuse(name="refused")
    crashed = work().Crash(name="crashed")
    killed = work().Die(name="killed")
    child = double("child", 1, {"role": refused})
    grandchild = double("grandchild", 1, {"role": child})
    good = double("good", 4)
    outcome = run_steps([refused, crashed, killed, grandchild, good], folder, workers=1)
    assert not outcome.complete
    assert outcome.failed["refused"] == "cases: expected 3 (got 2)"
    assert "KeyError: 'lost'" in outcome.failed["crashed"]
    assert "ended with status -9" in outcome.failed["killed"]
    assert outcome.skipped == {"child": "refused", "grandchild": "refused"}
    assert folder.outcome(good, dict) == {"value": 8}
    assert "lost" in (folder.run_path(crashed) / "error.txt").read_text()


def test_a_failed_step_is_retried_on_request_only(tmp_path, work_module):
    folder = Folder(tmp_path / "study")
    step, after = work().Refuse(name="step"), double("after", 1)
    child = double("child", 1, {"role": step})
    run_steps([child], folder, workers=1)
    source = work_module / "study_work.py"
    source.write_text(
        source.read_text().replace('raise InputError("cases: expected 3 (got 2)")', 'return {"value": 3}')
    )
    again = run_steps([child, after], folder, workers=1, retry=False)
    assert again.failed == {"step": "cases: expected 3 (got 2) (failed before; --retry tries again)"}
    assert again.skipped == {"child": "step"}
    assert folder.outcome(after, dict) == {"value": 2}
    assert run_steps([child], folder, workers=1, retry=True).complete
    assert folder.outcome(child, dict) == {"value": 8}
    assert folder.failure(step) is None


def test_each_worker_has_a_gpu_of_its_own_and_is_none_of_torchruns(tmp_path, monkeypatch):
    monkeypatch.setattr("timm_ext.study.runner.visible_gpus", lambda: ["3", "5"])
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    folder = Folder(tmp_path / "study")
    steps = [work().Place(name=f"s{i}") for i in range(8)]
    run_steps(steps, folder, workers=2)
    results = [folder.outcome(step, dict) for step in steps]
    assert {result["CUDA_VISIBLE_DEVICES"] for result in results} <= {"3", "5"}
    assert all(result["RANK"] is None and result["TORCHELASTIC_RUN_ID"] is None for result in results)


def test_workers_compute_with_one_thread(tmp_path):
    folder = Folder(tmp_path / "study")
    step = work().Threads(name="threads")
    run_steps([step], folder)
    assert folder.outcome(step, dict) == {"threads": 1}


RUN = """
import sys
from study_work import TYPES, Double
from timm_ext.study.records import Folder
from timm_ext.study.runner import run_steps
if __name__ == "__main__":
    folder = Folder(sys.argv[1])
    with folder.lock():
        steps = [Double(name=f"s{i}", value=i, sleep=0.15) for i in range(12)]
        run_steps(steps, folder, workers=2, types=TYPES)
"""


def run_script(path, modules):
    script = modules / "run.py"
    script.write_text(RUN)
    return subprocess.Popen([sys.executable, str(script), str(path)])


def records(folder):
    return sorted(p.parent.name for p in (folder.path / "runs").glob("*/record.json"))


def test_killed_runner_takes_its_workers_along_and_is_continued(tmp_path, work_module):
    folder = Folder(tmp_path / "study")
    first = run_script(folder.path, work_module)
    deadline = time.monotonic() + 300
    while len(records(folder)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = records(folder)
    assert 3 <= len(done) < 12
    time.sleep(0.5)
    begun = sum(len(p.read_text()) for p in folder.path.glob("runs/*/calls.txt"))
    time.sleep(0.5)
    assert sum(len(p.read_text()) for p in folder.path.glob("runs/*/calls.txt")) == begun
    assert run_script(folder.path, work_module).wait() == 0
    steps = [double(f"s{i}", i, sleep=0.15) for i in range(12)]
    assert [folder.outcome(step, dict) for step in steps] == [{"value": 2 * i} for i in range(12)]
    assert all(calls(folder, step) == 1 for step in steps if step.folder_name in done)


def test_a_foreign_record_stops_the_run(tmp_path):
    folder = Folder(tmp_path / "study")
    step = double("a", 1)
    folder.write_record(step, {})
    path = folder.run_path(step) / "record.json"
    path.write_text(path.read_text().replace(step.digest, "0" * 64))
    with pytest.raises(InputError, match="expected the record of"):
        run_steps([step], folder)
