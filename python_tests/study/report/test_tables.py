import csv
from dataclasses import replace

import numpy as np
import pytest
from study_samples import CASES, frame, study_results

from timm_ext.errors import InputError
from timm_ext.study.report.results import RUN
from timm_ext.study.report.statistics import bootstrap_interval, compare, holm
from timm_ext.study.report.tables import comparison_table, make_tables, write_tables


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tables")
    write_tables(make_tables(study_results()), path)
    return path


def table(folder, stem):
    with open(folder / f"{stem}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_dice_is_that_of_the_scores(folder):
    rows = table(folder, "dice")
    assert [row["region"] for row in rows[:4]] == ["mean", "WT", "TC", "ET"]
    assert [row["title"] for row in rows[::4]] == ["SCRATCH", "IMM-WARMUP", "T-IMM"] * 2
    dice = study_results().scores(8, "t-imm")
    row = rows[5 * 4]
    assert (row["method"], row["train_cases"], row["runs"], row["steps"]) == ("t-imm", "8", "6", "30")
    assert float(row["mean"]) == dice.mean(axis=(-2, -1)).mean()
    assert float(row["sd"]) == dice.mean(axis=(-2, -1)).std(ddof=1)
    assert (float(row["low"]), float(row["high"])) == bootstrap_interval(dice.mean(axis=-1))
    assert float(rows[5 * 4 + 2]["mean"]) == dice[..., 1].mean(axis=-1).mean()
    assert float(rows[5 * 4 + 2]["sd"]) == dice[..., 1].mean(axis=-1).std(ddof=1)


def test_the_other_tables_are_those_of_the_results(folder):
    results = study_results()
    cases = table(folder, "cases")
    assert len(cases) == 2 * 3 * 6 * len(CASES) * 3
    assert (cases[-1]["draw"], cases[-1]["seed"], cases[-1]["region"]) == ("1", "2", "ET")
    assert float(cases[-1]["dice"]) == results.scores(8, "t-imm")[-1, -1, -1, -1, -1]
    assert len(table(folder, "region-comparisons")) == 6 * 2 * 3
    assert len(table(folder, "curves")) == 2 * 3 * 6 * 3
    assert table(folder, "curves")[0]["seconds"] == "1.0"
    ratio = table(folder, "ratios")[1]
    assert (ratio["layer"], ratio["source"], ratio["ratio"]) == ("conv1", "M2", "0.5")
    regions = table(folder, "regions")
    assert (regions[-1]["metric"], regions[-1]["region"]) == ("hd95_mm", "ET")
    assert float(regions[-1]["mean"]) == results.scores(8, "t-imm", "hd95_mm")[..., 2].mean()
    assert table(folder, "stages")[0] == {
        "stage": "M1: task 1",
        "train_cases": "",
        "runs": "1",
        "steps": "200.0",
        "epochs": "25.0",
        "val_dice": "0.6",
        "seconds": "30.2",
    }


def test_forgetting_counts_the_runs_that_an_initialisation_depends_on(folder):
    rows = table(folder, "forgetting")
    assert [(row["method"], row["train_cases"]) for row in rows[::2]] == [
        ("imm-warmup", ""),
        ("t-imm", "4"),
        ("t-imm", "8"),
    ]
    assert (rows[0]["runs"], rows[0]["sd"]) == ("1", "0.0")
    assert (rows[2]["task"], rows[2]["runs"]) == ("task 1", "6")
    assert float(rows[2]["mean"]) == pytest.approx(0.4)
    assert float(rows[2]["sd"]) == pytest.approx(np.std([0.3, 0.4, 0.5] * 2, ddof=1))


def test_every_cell_of_a_csv_is_one_number_or_one_name(folder):
    names = {"method", "title", "stage", "a", "b", "metric", "region", "task", "case", "layer", "source"}
    seen = 0
    for path in folder.iterdir():
        for row in table(folder, path.stem):
            for column in row.keys() - names:
                assert row[column] in ("", "true", "false") or float(row[column]) is not None
                seen += 1
    assert seen > 1000


def test_comparisons_are_those_of_the_statistics(folder):
    results = study_results()
    rows = table(folder, "comparisons")
    assert [row["train_cases"] for row in rows] == ["4"] * 3 + ["8"] * 3
    differences = [
        (results.scores(count, a) - results.scores(count, b)).mean(axis=-1)
        for count in results.counts
        for a, b in results.pairs
    ]
    for row, expected in zip(rows, compare(differences, 0.01).to_dict("records"), strict=True):
        for name in ("beyond_chance", "equivalent"):
            assert row[name] == str(expected.pop(name)).lower()
        assert {name: float(row[name]) for name in expected} == pytest.approx(expected, rel=1e-9)


def test_a_lead_that_is_of_one_source_set_in_three_is_chance():
    results = study_results(sets=(0, 1, 2))
    cases = results.cases
    lost = (cases["method"] == "t-imm") & (cases["source_set"] > 0)
    unstable = replace(results, cases=cases.assign(dice=cases["dice"].where(~lost, cases["dice"] - 0.08)))
    for found, stable in ((results, True), (unstable, False)):
        table = comparison_table(found, [("dice", None)]).set_index(["a", "b", "train_cases"])
        row = table.loc["t-imm", "scratch", 4]
        assert row["low"] > 0
        assert row["p_holm"] < 0.01
        assert row["beyond_chance"] == stable


def test_holm_corrects_over_all_comparisons_made_together():
    rows = comparison_table(study_results(), [("dice", "WT"), ("hd95_mm", "WT")])
    assert len(rows) == 2 * 2 * 3
    assert rows["p_holm"].tolist() == holm(rows["p"]).tolist()
    assert rows["p_mixed_holm"].tolist() == holm(rows["p_mixed"]).tolist()
    assert not {"p_equivalence", "equivalent"} & {*rows}  # HD95 has no margin


def test_a_region_of_the_name_mean_is_a_region_like_others():
    results = study_results()
    named = replace(results, cases=results.cases.replace({"region": {"TC": "mean"}}))
    one, other = make_tables(results), make_tables(named)
    for name in ("dice", "comparisons", "regions", "region-comparisons"):
        assert one[name].drop(columns="region").equals(other[name].drop(columns="region"))


def test_a_table_without_rows_is_not_written(tmp_path):
    results = study_results()
    bare = replace(results, ratios=results.ratios[:0], forgetting=results.forgetting[:0])
    write_tables(make_tables(bare), tmp_path)
    assert not {"ratios", "forgetting"} & {path.stem for path in tmp_path.iterdir()}


def test_numbers_come_back_bit_for_bit(tmp_path):
    values = [0.1 + 0.2, 1e-300, float("nan")]
    write_tables({"curves": frame([["m", 1, 0, 0, 0, v] for v in values], [*RUN, "val_dice"])}, tmp_path)
    assert (tmp_path / "curves.csv").read_bytes().count(b"\n") == 4
    read = [row["val_dice"] for row in table(tmp_path, "curves")]
    assert list(map(float, read[:2])) == values[:2]
    assert read[2] == ""


def test_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        write_tables(make_tables(study_results()), tmp_path / "file")
