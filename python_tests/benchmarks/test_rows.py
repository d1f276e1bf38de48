"""Rows of benchmarks: what is run by default, parts of it, and result files of one machine each."""

import json
from argparse import Namespace

import pytest

from benchmarks import fisher, inference, machine, merge, result, rows, train_step, trainers
from benchmarks.inference_rivals import MAKERS
from benchmarks.pages import steps
from benchmarks.pages.tables import codes_of, read_json, told
from benchmarks.ways import WAYS, standard

COMMITTED = {
    "train_step_cpu.json": (train_step.SELECTION, WAYS),
    "inference_cpu.json": (inference.SELECTION, MAKERS),
    "trainers_cpu.json": (trainers.SELECTION, trainers.TRAINERS),
    "fisher_cpu.json": (fisher.PAPER.selection, ("plain", *fisher.PAPER.rivals)),
    "fisher_networks_cpu.json": (fisher.OTHERS.selection, ("plain", *fisher.PAPER.rivals)),
}
KEY = {"network": "isensee2017 8", "edge": 64, "batch": 2, "threads": 1}
HERE = {
    "machine": "Linux x86_64, One CPU",
    "cpu_model": "6-1",
    "bfloat16": "amx",
    "instruction_set": "avx512",
    "cores": 2,
    "torch": "2",
}


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.setattr(result, "keep_freed_memory", lambda: True)
    monkeypatch.setattr(result, "environment", lambda device: HERE)
    monkeypatch.setattr(result, "code", lambda: "one")


def key_of(row):
    return tuple(row[name] for name in KEY)


def add(path, network="isensee2017 8", value=1, again=False, keep=False):
    """Run one row, whose value stands for its measurement."""
    file = result.Result(path, Namespace(again=again, keep=keep))
    file.add("rows", {**KEY, "network": network}, lambda: {"value": value})
    return {row["network"]: (row["value"], row["code"]) for row in read(path)["rows"]}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", COMMITTED)
def test_the_default_rows_are_those_of_the_committed_result(file):
    selection, names = COMMITTED[file]
    committed = read_json(file)
    assert sorted(map(key_of, committed["rows"])) == sorted(map(key_of, selection))
    ways = set(standard(names, committed["environment"].get("bfloat16", "float32")))
    for row in committed["rows"]:
        assert {"ours"} <= set(row["of_plain"]) <= ways
    assert {(row["network"], row["edge"], row["batch"]) for row in committed["memory"]} <= {
        key_of(row)[:3] for row in selection
    }


def test_bfloat16_is_timed_where_the_cpu_is_fast_in_it():
    assert standard(WAYS, "float32") == ["plain", "channels_last", "ours"]
    for path in ("amx", "avx512_bf16"):
        assert standard(WAYS, path) == ["plain", "channels_last", "bfloat16", "ours", "ours bfloat16"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [("a", 32, 1, 1), ("a", 32, 2, 1), ("a", 64, 2, 1), ("b", 48, 2, 2)]),
        ({"network": ["b"]}, [("b", 48, 2, 2)]),
        ({"network": ["a"], "edge": [64]}, [("a", 64, 2, 1)]),
        ({"network": ["a"], "batch": [2]}, [("a", 32, 2, 1), ("a", 64, 2, 1)]),
        ({"network": ["b"], "edge": [48, 40], "threads": [1]}, [("b", 48, 2, 1), ("b", 40, 2, 1)]),
        ({"network": ["a"], "edge": [40]}, [("a", 40, 1, 1), ("a", 40, 2, 1)]),
        ({"network": ["c"], "batch": [4]}, [("c", 64, 4, 1)]),
    ],
)
def test_options_run_a_part_of_the_rows(options, expected):
    selection = [
        *rows.problems("a", (32,), (1, 2)),
        *rows.problems("a", (64,)),
        *rows.problems("b", (48,), threads=(2,)),
    ]
    asked = Namespace(**{name: options.get(name) for name in KEY})
    found = rows.chosen(selection, asked, {"edge": 64, "batch": 2, "threads": 1})
    assert [key_of(row) for row in found] == expected


def test_a_fisher_of_one_network_goes_into_its_own_committed_file():
    parts = fisher.parts_of(fisher.parse(["--network", "UNet 16-128"]))
    assert [(part.output.name, len(part.selection)) for part in parts] == [("fisher_networks_cpu.json", 1)]
    every = fisher.parts_of(fisher.parse([]))
    assert [part.selection for part in every] == [fisher.PAPER.selection, fisher.OTHERS.selection]


def test_parts_go_into_one_file(tmp_path):
    path = tmp_path / "rows.json"
    add(path, "SegResNet 16", 1)
    assert add(path, "isensee2017 8", 2) == {"isensee2017 8": (2, "one"), "SegResNet 16": (1, "one")}
    assert [row["network"] for row in read(path)["rows"]] == ["isensee2017 8", "SegResNet 16"]
    assert add(path, "isensee2017 8", 3)["isensee2017 8"] == (2, "one")
    assert add(path, "isensee2017 8", 3, again=True)["isensee2017 8"] == (3, "one")


def test_a_row_of_other_code_is_measured_anew_and_others_stay(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    for network in ("isensee2017 8", "SegResNet 16"):
        add(path, network, 1)
    monkeypatch.setattr(result, "code", lambda: "two")
    assert add(path, value=2, keep=True)["isensee2017 8"] == (1, "one")
    assert add(path, value=2) == {"isensee2017 8": (2, "two"), "SegResNet 16": (1, "one")}
    assert codes_of(read(path)) == {"one", "two"}


def test_a_file_of_another_machine_is_put_aside(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.json"
    add(path, value=1)
    before = read(path)
    for name, other in (("cpu_model", "6-2"), ("bfloat16", "float32"), ("instruction_set", "avx2")):
        path.write_text(json.dumps(before), encoding="utf-8")
        monkeypatch.setattr(result, "environment", lambda device, n=name, o=other: {**HERE, n: o})
        result.Result(path, Namespace(again=False, keep=False))
        assert read(path) == before
        assert add(path, "SegResNet 16", 2, keep=True) == {"SegResNet 16": (2, "one")}
        aside = tmp_path / "other-cpu" / "rows-one-cpu-avx512.json"
        assert read(aside) == before
        assert f"moved to {aside}" in capsys.readouterr().out
        aside.unlink()


def test_a_file_of_other_versions_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    add(path)
    monkeypatch.setattr(result, "environment", lambda device: {**HERE, "torch": "3"})
    with pytest.raises(SystemExit, match=r"same versions \(torch 3, got 2\): give another file"):
        add(path, "SegResNet 16")
    assert [row["network"] for row in read(path)["rows"]] == ["isensee2017 8"]


def test_rows_of_a_merge_are_not_added_to_those_of_another_machine(tmp_path):
    path = tmp_path / "merge.json"
    now = {"environment": HERE, "rows": []}
    assert merge.same_machine(now, now, path) is now
    with pytest.raises(
        SystemExit, match=r"expected rows of the same machine and versions \(cores 2, got 4\)"
    ):
        merge.same_machine({"environment": {**HERE, "cores": 4}}, now, path)


def test_the_machine_says_which_bfloat16_it_has():
    found = machine.environment("cpu")
    assert found["bfloat16"] in ("amx", "avx512_bf16", "float32")
    assert isinstance(found["cpu_model"], str)


def test_pages_mark_rows_whose_rounds_were_unlike():
    row = {**KEY, "milliseconds": {"plain": 100.0, "ours": 50.0}, "of_plain": {"plain": 1.0, "ours": 0.5}}
    assert steps.MARK not in steps.times_table([row], {"ours": "timm_ext"})
    unlike = {**row, "of_plain": {"plain": 1.0, "ours": 0.44}}
    told_so = steps.times_table([unlike], {"ours": "timm_ext"})
    assert f"| 0.44{steps.MARK} |" in told_so
    assert told_so.endswith(steps.DOUBTFUL)


def test_pages_say_which_bfloat16_a_machine_has():
    assert told({"environment": HERE, "rows": [{"code": "one"}]}).endswith("2 cores, avx512, AMX, torch 2")
    without = {**HERE, "bfloat16": "float32"}
    assert told({"environment": without, "rows": [{"code": "one"}]}).endswith("2 cores, avx512, torch 2")


def test_pages_say_how_many_versions_a_result_is_of():
    noted = {"environment": HERE, "rows": [{"code": "one"}, {"code": "two"}]}
    assert told(noted).endswith(", 2 versions of the package")
    assert "version" not in told({"environment": HERE, "rows": [{"code": "one"}]})
    assert "version" not in told({"environment": {**HERE, "code": "one"}, "rows": [{}]})
    assert told({"environment": HERE, "rows": [{}]}).endswith(", an earlier version of the package")
