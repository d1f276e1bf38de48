import csv
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from timm_ext.study.gather import Cell, StageRow, StudySummary, differences
from timm_ext.study.statistics import bootstrap_interval, holm
from timm_ext.study.study_report import conclusions, limits, write_study_report
from timm_ext.study.summary import Example, ForgettingRow, MethodResult, Ratios

DRAWS, SEEDS, CASES = 2, 3, 12
REGIONS = ("WT", "TC", "ET")
KEYS = ("scratch", "imm-warmup", "t-imm")


def result(key, offset, count):
    generator = np.random.default_rng(len(key) + count)
    cases = np.random.default_rng(0).uniform(0.3, 0.6, size=(1, CASES, 3))
    dice = cases + offset + generator.normal(0, 0.004, size=(DRAWS * SEEDS, CASES, 3))
    curve = tuple((step, 0.1 + step / 200) for step in (10, 20, 30))
    clock = tuple((step / 10, dice) for step, dice in curve)
    runs = DRAWS * SEEDS
    return MethodResult(
        key, key.upper(), 30, key == "extra", dice, (curve,) * runs, 3.0, 10 * dice, (clock,) * runs
    )


def cell(count, offsets=(0.0, 0.0, 0.1)):
    methods = tuple(result(key, offset, count) for key, offset in zip(KEYS, offsets, strict=True))
    ratios = {"t-imm": Ratios(("conv1", "conv2"), ("M1", "M2"), np.full((DRAWS * SEEDS, 2, 2), 0.5))}
    forgetting = (ForgettingRow("T-IMM", {"task 1": (0.3, 0.4), "task 2": (0.2, 0.2)}),)
    return Cell(count, DRAWS, methods, ratios, forgetting)


def summary(**changes):
    image = np.random.default_rng(3).uniform(size=(20, 24))
    labels = np.zeros((20, 24), dtype=np.uint8)
    labels[5:10, 5:10] = 2
    values = {
        "title": "Study <of> initialisations",
        "facts": (("Seeds", "0, 1, 2"),),
        "notes": ("A note.",),
        "seeds": (0, 1, 2),
        "draws": (0, 1),
        "cases": tuple(f"case-{i:02d}" for i in range(CASES)),
        "diagonals": np.full(CASES, 300.0),
        "regions": REGIONS,
        "references": ("scratch", "imm-warmup"),
        "cells": (cell(4), cell(8)),
        "stages": (StageRow("M1: task 1", None, 1, 200, 25, 0.6, 30.2),),
        "forgetting": (ForgettingRow("MODE-IMM", {"task 1": (0.25,), "task 2": (0.24,)}),),
        "labels": {1: "core", 2: "oedema"},
        "examples": (Example("case-00", "FLAIR", image, labels, {"T-IMM": labels}, {"T-IMM": 0.7}),),
    }
    return StudySummary(**{**values, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("report")
    write_study_report(summary(), path)
    return path


def table(folder, stem):
    with open(folder / "tables" / f"{stem}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_each_pair_is_compared_once_at_every_number_of_cases():
    example = summary()
    assert example.pairs == [("imm-warmup", "scratch"), ("t-imm", "scratch"), ("t-imm", "imm-warmup")]
    rows = differences(example, [("Dice", None)])
    assert [row.train_cases for row in rows] == [4, 4, 4, 8, 8, 8]


def test_holm_corrects_over_all_comparisons_made_together():
    rows = differences(summary(), [("Dice", 0), ("HD95", 0)])
    assert len(rows) == 2 * 2 * 3
    assert [row.comparison.p_holm for row in rows] == holm([row.comparison.p for row in rows])
    assert {(row.metric, row.region) for row in rows} == {("Dice", "WT"), ("HD95", "WT")}


def test_scores_keep_draws_and_seeds_apart():
    example = summary()
    first = example.cells[0]
    method = first.methods[2]
    dice = first.dice(method)
    assert dice.shape == (DRAWS, SEEDS, CASES)
    np.testing.assert_array_equal(dice[1, 0], method.dice[SEEDS].mean(axis=1))
    np.testing.assert_array_equal(first.dice(method, 1)[0, 2], method.dice[2, :, 1])


def test_an_undefined_distance_is_the_diagonal_of_the_scan():
    distances = np.full((DRAWS * SEEDS, CASES, 3), 2.0)
    distances[0, 5, 1] = np.nan
    first = cell(4)
    method = replace(first.methods[0], hd95=distances)
    diagonals = np.arange(CASES) + 100.0
    values = first.hd95(method, 1, diagonals)
    assert values[0, 0, 5] == 105.0
    assert np.isfinite(values).all()
    assert first.hd95(method, None, diagonals)[0, 0, 5] == pytest.approx((2 + 105 + 2) / 3)


def test_tables_are_those_of_the_arrays(folder):
    dice = table(folder, "dice")
    assert [row["title"] for row in dice] == ["SCRATCH", "IMM-WARMUP", "T-IMM"] * 2
    scores = cell(8).dice(cell(8).methods[2])
    assert (dice[5]["method"], dice[5]["train_cases"]) == ("t-imm", "8")
    assert float(dice[5]["mean"]) == scores.mean()
    assert (float(dice[5]["low"]), float(dice[5]["high"])) == bootstrap_interval(scores)
    cases = table(folder, "cases")
    assert len(cases) == 2 * 3 * DRAWS * SEEDS * CASES
    assert cases[-1]["draw"] == "1"
    assert float(cases[-1]["dice ET"]) == cell(8).methods[2].dice[-1, -1, 2]
    assert len(table(folder, "region-comparisons")) == 6 * 2 * 3
    assert len(table(folder, "curves")) == 2 * 3 * DRAWS * SEEDS * 3
    assert table(folder, "curves")[0]["seconds"] == "1.0"
    assert table(folder, "ratios")[0]["M1"] == "0.5"
    assert table(folder, "stages")[0] == {
        "stage": "M1: task 1",
        "train_cases": "",
        "runs": "1",
        "steps": "200",
        "epochs": "25",
        "val_dice": "0.6",
        "seconds": "30.2",
    }
    rows = table(folder, "forgetting")
    assert [row["title"] for row in rows[::2]] == ["MODE-IMM", "T-IMM, N = 4", "T-IMM, N = 8"]
    assert (rows[2]["task"], rows[2]["runs"]) == ("task 1", "2")
    assert float(rows[2]["mean"]) == pytest.approx(0.35)
    assert float(rows[2]["sd"]) == pytest.approx(0.1 / 2**0.5)


def test_every_cell_of_a_csv_is_one_number_or_one_name(folder):
    names = {"method", "title", "stage", "a", "b", "metric", "region", "task", "case", "layer"}
    seen = 0
    for path in (folder / "tables").iterdir():
        for row in table(folder, path.stem):
            for column in row.keys() - names:
                assert row[column] in ("", "true", "false") or float(row[column]) is not None
                seen += 1
    assert seen > 1000


def test_a_comparisons_numbers_are_those_of_the_statistics(folder):
    for row, difference in zip(
        table(folder, "comparisons"), differences(summary(), [("Dice", None)]), strict=True
    ):
        c = difference.comparison
        assert (row["a"], row["b"], row["beyond_chance"]) == (
            c.a,
            c.b,
            "true" if c.beyond_chance else "false",
        )
        numbers = {
            "mean": c.difference,
            "low": c.low,
            "high": c.high,
            "sd": c.seed_spread,
            "effect": c.effect,
        }
        numbers |= {"p": c.p, "p_holm": c.p_holm, "p_runs": c.p_runs}
        assert {name: float(row[name]) for name in numbers} == numbers


EVIL = "$x_{$[/bold]<b>\x1b[31m"


def test_names_are_taken_as_they_are(tmp_path):
    image, labels = summary().examples[0].image, summary().examples[0].truth
    examples = (Example(EVIL, EVIL, image, labels, {EVIL: labels}, {EVIL: 0.7}),)
    forgetting = (ForgettingRow(EVIL, {"task 1": (0.25,), "task 2": (0.5,)}),)
    odd = summary(
        title=EVIL,
        notes=(EVIL,),
        regions=(EVIL, "TC", "ET"),
        facts=((EVIL, EVIL),),
        examples=examples,
        labels={2: EVIL},
        forgetting=forgetting,
    )
    page = Page(write_study_report(odd, tmp_path).read_text(encoding="utf-8"))
    assert "$x_{$[/bold]<b>\\x1b[31m" in page.text
    assert "b" not in {tag for tag, _ in page.tags}
    assert "\x1b" not in page.text
    assert {row["region"] for row in table(tmp_path, "regions")} == {EVIL, "TC", "ET"}


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_page_is_whole_and_asks_for_nothing_outside_itself(folder):
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 5
    assert all(a["src"].startswith("data:image/png;base64,") and len(a["alt"]) > 30 for a in images)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    for words in ("Study <of> initialisations", "A note.", "Mixing ratios per layer", "Forgetting", "Stages"):
        assert words in page.text


def test_same_summary_gives_the_same_bytes(folder, tmp_path):
    write_study_report(summary(), tmp_path)
    for path in folder.rglob("*.*"):
        assert (tmp_path / path.relative_to(folder)).read_bytes() == path.read_bytes()


def test_conclusions_name_clear_differences_and_no_others():
    example = summary()
    rows = differences(example, [("Dice", None)])
    text = "\n".join(conclusions(example, rows))
    assert text.count("“T-IMM” gains 0.1") == 4
    assert "“IMM-WARMUP” gains" not in text
    assert "2 of the 6 comparisons are not told apart" in text


def test_limits_say_when_nothing_could_be_shown():
    assert "no difference can be shown" not in "\n".join(limits(summary(), 6))
    assert "no difference can be shown" in "\n".join(limits(summary(cases=("a", "b", "c", "d")), 6))


def test_a_study_without_learned_ratios_and_distances(tmp_path):
    plain = tuple(replace(m, hd95=None, clocks=()) for m in cell(4).methods)
    cells = (Cell(4, DRAWS, plain, {}, ()),)
    write_study_report(summary(cells=cells, forgetting=(), examples=()), tmp_path)
    assert not (tmp_path / "tables" / "ratios.csv").exists()
    assert not (tmp_path / "tables" / "forgetting.csv").exists()
    assert {row["metric"] for row in table(tmp_path, "regions")} == {"Dice"}
    assert "hd95 WT" not in table(tmp_path, "cases")[0]
