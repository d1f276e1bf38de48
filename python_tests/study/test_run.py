import csv
import json
import multiprocessing
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console
from study_plans import finished, results

from timm_ext.cli import run
from timm_ext.config import load_settings
from timm_ext.errors import InputError
from timm_ext.study.plan import StudyPlan, bundled_plans
from timm_ext.study.records import Folder
from timm_ext.study.run import run_study

TINY = ["methods=[scratch, t-imm]", "references=[scratch]", "train_cases=[1]"]


def start(out, *more):
    fields = [part for field in TINY for part in ("--set", field)]
    arguments = ["study", "smoke", "--workers", "2", "--out", str(out), *fields, *more]
    code = "from timm_ext.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def tiny():
    return load_settings(StudyPlan, bundled_plans()["smoke"], TINY)


def rows(out, stem):
    with open(out / "tables" / f"{stem}.csv", newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "whole"
    process = start(out)
    text, _ = process.communicate()
    assert process.returncode == 0, text
    return out, text


@pytest.mark.slow
def test_stages_that_no_method_needs_are_left_out(tmp_path):
    methods = ["--set", "methods=[scratch, transfer-joint, transfer-1-all]", "--set", "draws=[0]"]
    process = start(tmp_path / "out", *methods)
    text, _ = process.communicate()
    assert process.returncode == 0, text
    assert [row["stage"] for row in rows(tmp_path / "out", "stages")] == [
        "Source of Transfer from joint training",
        "Source of Transfer from M1, all source cases",
        "Fine-tuning, From scratch",
        "Fine-tuning, Transfer from joint training",
        "Fine-tuning, Transfer from M1, all source cases",
    ]
    assert not list((tmp_path / "out" / "tables").glob("forgetting*"))


@pytest.mark.slow
def test_smoke_plan_end_to_end(undisturbed):
    out, text = undisturbed
    assert "Cost of the study" in text
    assert "Report:" in text
    assert len(rows(out, "cases")) == 2 * 2 * 3 * 3  # methods, draws, test cases, regions
    assert {row["draw"] for row in rows(out, "cases")} == {"0", "1"}
    stages = [row["stage"] for row in rows(out, "stages")]
    assert stages == [
        "M1: parcellation-1-7",
        "M2: parcellation-8-14",
        "Adaptation, T-IMM",
        "Fine-tuning, From scratch",
        "Fine-tuning, T-IMM",
    ]
    assert {(row["title"], row["train_cases"]) for row in rows(out, "forgetting")} == {("T-IMM", "1")}
    assert len(list((out / "figures").glob("*.png"))) == 5
    assert len((out / "report.html").read_bytes()) > 100_000


@pytest.mark.slow
def test_killed_study_goes_on_to_the_same_records(undisturbed, tmp_path):
    out = tmp_path / "study"
    generator = random.Random(7)
    for target in (1, 8, 13):
        process = start(out)
        while len(finished(out)) < target and process.poll() is None:
            time.sleep(0.02)
        time.sleep(generator.uniform(0, 0.6))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = start(out)
    text, _ = process.communicate()
    assert process.returncode == 0, text
    assert results(out) == results(undisturbed[0])
    for stem in ("dice", "comparisons", "cases", "curves", "ratios", "stages"):
        assert rows(out, stem) == rows(undisturbed[0], stem)


@pytest.mark.slow
def test_failed_run_is_told_and_retried_on_request(undisturbed, tmp_path):
    out = tmp_path / "study"
    shutil.copytree(undisturbed[0], out, symlinks=True)
    test_run = next((out / "runs").glob("run-t-imm-seed0-n1-draw1-*"))
    (test_run / "record.json").unlink()
    initial = next((out / "runs").glob("adapt-t-imm-seed0-n1-draw1-*")) / "initial.safetensors"
    whole = initial.read_bytes()
    initial.write_bytes(whole[:100])
    quiet = {"workers": 1, "console": Console(quiet=True)}
    with pytest.raises(
        InputError, match=r"1 of the steps failed:\n  run-t-imm-seed0-n1-draw1: .*safetensors"
    ):
        run_study(tiny(), out, **quiet)
    initial.write_bytes(whole)
    with pytest.raises(InputError, match=r"failed before; --retry tries again"):
        run_study(tiny(), out, **quiet)
    run_study(tiny(), out, retry=True, **quiet)
    assert results(out) == results(undisturbed[0])


def hold(path, held, release):
    with Folder(path).lock():
        held.set()
        release.wait(30)


@pytest.fixture
def untimed(monkeypatch):
    """Fail where a training step is timed."""
    monkeypatch.setattr("timm_ext.study.run.measure_step", lambda plan: pytest.fail("timed too early"))


@pytest.mark.usefixtures("untimed")
def test_two_processes_in_one_folder_are_refused(tmp_path, capsys):
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(tmp_path, held, release))
    holder.start()
    assert held.wait(30)
    assert run(["study", "smoke", "--out", str(tmp_path)]) == 1
    release.set()
    holder.join()
    assert f"in use by another timm-ext process ({holder.pid})" in capsys.readouterr().err


def test_a_folder_of_other_settings_is_refused(tmp_path):
    Folder(tmp_path).claim({"adapt_steps": 9})
    with pytest.raises(InputError, match=r"holds results of other settings \(.*adapt_steps 9 there, 2 here"):
        run_study(tiny(), tmp_path, console=Console(quiet=True))


def test_dry_run_prints_the_cost_and_leaves_nothing(tmp_path, capsys):
    assert run(["study", "smoke", "--out", str(tmp_path / "out"), "--dry-run", "--workers", "2"]) == 0
    text = capsys.readouterr().out
    assert "fine-tune and test" in text
    assert "with 2 workers" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["nothing"],
            "expected a YAML file or one of brats, demo, hippocampus, paper, small, smoke (got 'nothing')",
        ),
        (["smoke", "--set", "methods=[magic]"], "method: expected one of scratch"),
        (["smoke", "--set", "stepz=1"], "--set: unknown field stepz"),
        (["smoke", "--set", "size=[1, 2]"], "--set: size"),
        (["smoke", "--set", "val_cases=0"], "val_cases: expected a whole number from 1 to"),
        (["smoke", "--set", "source_test=0"], "source_test: expected a whole number from 1 to"),
        (["smoke", "--set", "pool=1"], "expected at most the 1 available training cases (got 2)"),
        (["smoke", "--label-maps", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, message):
    assert run(["study", *arguments, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_only_torchruns_first_process_runs_the_study(tmp_path, monkeypatch, capsys):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert run(["study", "smoke", "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert run(["study", "smoke", "--out", str(tmp_path / "out")]) == 1
    assert "expected the processes of one machine (got 2 in all)" in capsys.readouterr().err


@pytest.mark.usefixtures("untimed")
def test_a_folder_of_an_earlier_version_is_refused(tmp_path, capsys):
    (tmp_path / "plan.json").write_text(json.dumps({"title": "A study of last year"}))
    assert run(["study", "smoke", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "expected a study of format 3 (got format 1" in error
    assert len(error.splitlines()) == 1


def test_a_dry_run_says_what_the_study_can_see(tmp_path, capsys):
    methods = ["--set", "methods=[scratch, transfer-1]", "--set", "references=[scratch]"]
    assert run(["study", "smoke", "--out", str(tmp_path / "out"), "--dry-run", *methods]) == 0
    told = capsys.readouterr()
    assert "Smallest difference of mean Dice" in told.out + told.err
    assert run(["study", "smoke", "--out", str(tmp_path / "out"), "--dry-run", "--power-from", "no"]) == 1
    assert "no: expected tables/cases.csv" in capsys.readouterr().err


def test_download_is_for_data_sets_of_the_decathlon(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out"), "--dry-run", "--download"]
    assert run(["study", "smoke", *out]) == 1
    assert "target_data: expected a data set to download" in capsys.readouterr().err
    assert run(["study", "smoke", *out, "--target-data", str(tmp_path / "mine")]) == 1
    assert "mine: expected a folder named after a data set of the Decathlon" in capsys.readouterr().err
