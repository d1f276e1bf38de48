import csv
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from timm_ext.errors import InputError
from timm_ext.study.report import write_report
from timm_ext.study.summary import (
    Example,
    ForgettingRow,
    MethodResult,
    Ratios,
    Summary,
    conclusions,
    limits,
)

SEEDS, CASES, REGIONS = 3, 12, ("WT", "TC", "ET")


def method(key, title, offset, *, extra=False, noise=0.004):
    generator = np.random.default_rng(len(key))
    cases = np.random.default_rng(0).uniform(0.3, 0.6, size=(1, CASES, 3))
    dice = cases + offset + generator.normal(0, noise, size=(SEEDS, CASES, 3))
    curves = tuple(
        tuple((step, 0.1 + 0.004 * step + seed / 50) for step in range(0, 101, 10)) for seed in range(SEEDS)
    )
    return MethodResult(key, title, 120 if extra else 100, extra, dice, curves, 20.0)


def summary(**changes):
    image = np.random.default_rng(3).uniform(size=(40, 48))
    labels = np.zeros((40, 48), dtype=np.uint8)
    labels[10:20, 10:20] = 2
    labels[12:16, 12:16] = 4
    values = {
        "title": "Demo <T-IMM> & friends",
        "facts": (("Seeds", "0, 1, 2"), ("Machine", "2 cores")),
        "notes": ("Task 3 <is> small.",),
        "seeds": (0, 1, 2),
        "cases": tuple(f"case-{i:02d}" for i in range(CASES)),
        "regions": REGIONS,
        "methods": (
            method("scratch", "scratch", 0.0),
            method("mode-imm", "mode-IMM", 0.1),
            method("t-imm", "T-IMM", 0.1),
            method("t-imm-extra", "T-IMM, adaptation extra", 0.1, extra=True),
            method("same", "as scratch", 0.0),
        ),
        "baseline": "scratch",
        "ratios": Ratios(("conv1", "conv2"), ("M1", "M2"), np.full((SEEDS, 2, 2), 0.5)),
        "forgetting": (ForgettingRow("M1", {"task 1": (0.63,), "task 2": (0.01,)}),),
        "labels": {1: "core", 2: "oedema", 4: "enhancing"},
        "examples": (Example("case-00", "FLAIR", image, labels, {"T-IMM": labels}, {"T-IMM": 0.7}),),
    }
    return Summary(**{**values, **changes})


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("report")
    write_report(summary(), path)
    return path


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_page_asks_for_nothing_outside_itself(folder, page):
    sources = [a[key] for _, a in page.tags for key in ("src", "href", "srcset", "data") if key in a]
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    style = re.search("<style>(.*)</style>", (folder / "report.html").read_text(), re.S)[1]
    assert "url(" not in style
    assert "@import" not in style


def test_page_is_accessible(page):
    tags = [tag for tag, _ in page.tags]
    assert ("html", {"lang": "en"}) in page.tags
    images = [a for tag, a in page.tags if tag == "img"]
    assert len(images) == 4
    assert all(len(a["alt"]) > 30 for a in images)
    assert tags.count("figcaption") == len(images)
    assert tags.count("caption") == tags.count("table") == 3
    assert all("scope" in a for tag, a in page.tags if tag == "th")
    assert tags.count("h1") == 1


def test_text_is_escaped_and_complete(page):
    assert "Demo <T-IMM> & friends" in page.text
    assert "Task 3 <is> small." in page.text
    for head in ("What was run", "What these numbers show", "Learning curves", "Mixing ratios", "Forgetting"):
        assert head in page.text


def test_tables_and_figures_lie_beside_the_page(folder):
    assert sorted(p.name for p in (folder / "figures").iterdir()) == [
        "curves.png",
        "dice.png",
        "examples.png",
        "ratios.png",
    ]
    with open(folder / "tables" / "dice.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["region"] for row in rows[:4]] == ["mean", *REGIONS]
    scratch = summary().methods[0]
    assert float(rows[0]["mean"]) == scratch.per_seed.mean()
    assert float(rows[0]["sd"]) == scratch.per_seed.std(ddof=1)
    assert float(rows[2]["mean"]) == scratch.dice[:, :, 1].mean(axis=1).mean()
    assert (rows[12]["title"], rows[12]["steps"]) == ("T-IMM, adaptation extra", "120")
    with open(folder / "tables" / "cases.csv", newline="", encoding="utf-8") as file:
        assert len(list(csv.reader(file))) == 1 + 5 * SEEDS * CASES


def test_same_summary_gives_the_same_bytes(folder, tmp_path):
    write_report(summary(), tmp_path)
    assert (tmp_path / "report.html").read_bytes() == (folder / "report.html").read_bytes()


def test_conclusions_name_clear_differences_and_no_others():
    example = summary()
    text = "\n".join(conclusions(example, example.comparisons()))
    assert re.search(r"Against “scratch”, “mode-IMM” gains 0\.1\d\d mean Dice", text)
    assert "Not told apart from “scratch” here: “as scratch”." in text
    assert not re.search(r"mode-IMM” and “T-IMM” differ", text)
    assert "no ranking" in text


def test_noise_is_never_called_a_difference():
    noisy = [method(key, key, 0.0, noise=0.2) for key in ("scratch", "a", "bb", "ccc")]
    example = summary(methods=tuple(noisy))
    text = "\n".join(conclusions(example, example.comparisons()))
    assert "gains" not in text
    assert "loses" not in text
    assert "Not told apart from “scratch” here: “a”, “bb”, “ccc”." in text


def test_limits_say_when_nothing_could_be_shown():
    few = [
        MethodResult(m.key, m.title, m.steps, m.extra, m.dice[:, :3], m.curves, m.seconds)
        for m in summary().methods
    ]
    text = "\n".join(limits(summary(methods=tuple(few), cases=("a", "b", "c"))))
    assert "cannot show any difference" in text
    assert "cannot show any difference" not in "\n".join(limits(summary()))
    assert "“T-IMM, adaptation extra” had more optimiser steps" in text


def test_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        write_report(summary(), tmp_path / "file")
