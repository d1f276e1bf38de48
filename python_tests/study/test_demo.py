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
from timm_ext.errors import InputError
from timm_ext.networks.io import load_network
from timm_ext.study.demo import demo_plan, run_demo
from timm_ext.study.records import Folder

# A shell starts what it runs in the background deaf to SIGINT, and so are the processes that this one starts.
CODE = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from timm_ext.cli import main
main()
"""


def start(out):
    arguments = ["demo", "--quick", "--seeds", "1", "--workers", "2", "--out", str(out)]
    return subprocess.Popen(
        [sys.executable, "-c", CODE, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "whole"
    process = start(out)
    text, _ = process.communicate()
    assert process.returncode == 0, text
    return out, text


@pytest.mark.slow
def test_quick_demo_end_to_end(undisturbed, tmp_path):
    out, text = undisturbed
    assert "Report:" in text
    page = (out / "report.html").read_text(encoding="utf-8")
    for title in (
        "From scratch",
        "Transfer from M1",
        "Mean-IMM",
        "Mode-IMM + warm-up",
        "T-IMM, adaptation extra",
    ):
        assert title in page
    assert "http" not in page.replace("http-equiv", "")
    heads = (out / "tables" / "forgetting.csv").read_text().splitlines()[0]
    assert heads == "method,title,train_cases,task,mean,sd,runs"
    for name in ("M1", "fisher-M2", "mode-imm-initial", "t-imm-initial", "t-imm", "scratch"):
        assert (out / "checkpoints" / f"{name}.safetensors").is_file()
    _, checkpoint = load_network(out / "checkpoints" / "t-imm-initial.safetensors")
    assert checkpoint.metadata["merge"]["sources"] == ["M1", "M2"]
    cases = next((out / "runs").glob("cases-test-*")) / "cases"
    network = out / "checkpoints" / "t-imm.safetensors"
    assert run(["predict", str(network), str(cases), "--out", str(tmp_path)]) == 0
    tested = next((out / "runs").glob("run-t-imm-seed0-*")) / "predictions" / "test-000.nii.gz"
    assert (tmp_path / "test-000.nii.gz").read_bytes() == tested.read_bytes()


@pytest.mark.slow
def test_killed_demo_goes_on_to_the_same_records(undisturbed, tmp_path):
    out = tmp_path / "demo"
    generator = random.Random(5)
    for target in (2, 9, 14):
        process = start(out)
        while len(finished(out)) < target and process.poll() is None:
            time.sleep(0.05)
        time.sleep(generator.uniform(0, 1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (out / "report.html").exists()
    process = start(out)
    text, _ = process.communicate()
    assert process.returncode == 0, text
    assert results(out) == results(undisturbed[0])
    for table in ("comparisons", "cases", "forgetting"):
        one, other = (folder / "tables" / f"{table}.csv" for folder in (out, undisturbed[0]))
        assert one.read_text() == other.read_text()


@pytest.mark.slow
def test_interrupted_demo_ends_at_once_with_one_line(tmp_path):
    process = start(tmp_path / "demo")
    while not finished(tmp_path / "demo") and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    again = f"timm-ext demo --quick --seeds 1 --workers 2 --out {tmp_path / 'demo'}"
    assert text.splitlines()[-1] == f"error: interrupted; go on with: {again}"
    assert "Traceback" not in text


@pytest.mark.slow
def test_failed_step_is_reported_and_retried(undisturbed, tmp_path):
    out = tmp_path / "demo"
    shutil.copytree(undisturbed[0], out)
    fisher, test_run = (next((out / "runs").glob(f"{name}-*")) for name in ("fisher-M1", "run-mode-imm"))
    (test_run / "record.json").unlink()
    (test_run / "training" / "log.csv").unlink()
    whole = (fisher / "fisher.safetensors").read_bytes()
    (fisher / "fisher.safetensors").write_bytes(whole[:100])
    with pytest.raises(
        InputError, match=r"1 of the steps failed:\n  run-mode-imm-seed0-n2-draw0: .*fisher\.safetensors"
    ):
        run_demo(out, demo_plan(seeds=1, quick=True), workers=1, console=Console(quiet=True))
    (fisher / "fisher.safetensors").write_bytes(whole)
    run_demo(out, demo_plan(seeds=1, quick=True), workers=1, console=Console(quiet=True))
    assert results(out) == results(undisturbed[0])


def test_demo_refuses_a_folder_of_other_settings(tmp_path, capsys):
    Folder(tmp_path).claim(demo_plan().model_dump(mode="json"))
    assert run(["demo", "--quick", "--out", str(tmp_path)]) == 1
    assert "holds results of other settings" in capsys.readouterr().err


def test_the_demo_is_its_plan_with_what_is_said_otherwise(tmp_path):
    plan = demo_plan(seeds=2, label_maps=tmp_path)
    transfers = ("scratch", "transfer-1", "transfer-2")
    assert plan.methods == (*transfers, "mean-imm", "mode-imm", "imm-warmup", "t-imm", "t-imm-extra")
    assert (plan.seeds, plan.source, plan.train_cases) == ((0, 1), str(tmp_path), (4,))
    assert demo_plan(quick=True).budget(2) == (6, 6, 2)
    with pytest.raises(InputError, match=r"seeds: expected at least 1 \(got 0\)"):
        demo_plan(seeds=0)


def test_demo_needs_enough_label_maps(tmp_path, capsys):
    maps = tmp_path / "maps"
    maps.mkdir()
    for name in ("a", "b"):
        (maps / f"{name}.nii.gz").touch()
    assert run(["demo", "--label-maps", str(maps), "--out", str(tmp_path / "out")]) == 1
    assert "expected at least 4" in capsys.readouterr().err
