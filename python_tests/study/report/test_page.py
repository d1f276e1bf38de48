import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from study_samples import frame, study_results

from timm_ext.study.report.page import write_report
from timm_ext.study.report.results import Example

EVIL = "$x_{$[/bold]<b>\x1b[31m"


class Page(HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def heads(self):
        return [line for line in self.text.splitlines() if line]


@pytest.fixture(scope="module", params=[(4,), (4, 8)], ids=["one count", "several"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("report")
    write_report(study_results(request.param), path)
    return path


@pytest.fixture(scope="module")
def page(folder):
    return Page(folder / "report.html")


def test_page_asks_for_nothing_outside_itself(folder, page):
    sources = [a[key] for _, a in page.tags for key in ("src", "href", "srcset", "data") if key in a]
    assert sum(source.startswith("data:image/png;base64,") for source in sources) == 5
    anchors = {a["id"] for _, a in page.tags if "id" in a}
    others = {source for source in sources if not source.startswith(("data:", "tables/"))}
    assert others == {f"#{anchor}" for anchor in anchors}
    assert all((folder / source).is_file() for source in sources if source.startswith("tables/"))
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    style = re.search("<style>(.*)</style>", (folder / "report.html").read_text(), re.S)[1]
    assert "url(" not in style
    assert "@import" not in style


def test_page_is_accessible(page):
    tags = [tag for tag, _ in page.tags]
    assert ("html", {"lang": "en"}) in page.tags
    images = [a for tag, a in page.tags if tag == "img"]
    assert all(len(a["alt"]) > 30 for a in images)
    assert tags.count("figcaption") == len(images) == 5
    assert tags.count("caption") == tags.count("table") >= 5
    tables = re.findall(r"tables/[a-z-]+\.csv", page.text)
    assert tables == [a["href"] for tag, a in page.tags if tag == "a" and a["href"].startswith("tables/")]
    captioned = tags.count("caption") + tags.count("figcaption")
    assert len(tables) == captioned + tables.count("tables/region-comparisons.csv")
    assert {"tables/curves.csv", "tables/ratios.csv", "tables/cases.csv"} < set(tables)
    assert all("scope" in a for tag, a in page.tags if tag == "th")
    assert tags.count("h1") == 1


def test_text_is_escaped_and_complete(page):
    assert "Study <of> initialisations & friends" in page.text
    assert "A <note>." in page.text
    for head in ("What was run", "What these numbers show", "Learning curves", "Mixing ratios", "Forgetting"):
        assert head in page.text
    assert "3 seeds × 2 draws of the training cases" in page.text


def test_tables_and_figures_lie_beside_the_page(folder):
    assert {path.stem for path in (folder / "figures").iterdir()} == {
        *("curves", "dice", "differences", "examples", "ratios")
    }
    stems = {path.stem for path in (folder / "tables").iterdir()}
    assert stems == {
        *("cases", "comparisons", "curves", "dice", "forgetting", "ratios", "region-comparisons", "regions"),
        "stages",
    }


def test_one_number_of_cases_has_the_simple_form(tmp_path):
    text = Page(write_report(study_results((4,), (0,)), tmp_path)).text
    assert "Mean ± SD" in text
    assert "Training cases" not in text
    assert "draws" not in text


def test_several_numbers_of_cases_stand_side_by_side(tmp_path):
    text = Page(write_report(study_results(), tmp_path)).text
    assert "N = 4" in text
    assert "N = 8" in text
    assert "against “SCRATCH” with 4 training cases (95 % interval" in text


def test_the_alternative_text_keeps_small_dice(tmp_path):
    results = study_results((4,))
    page = Page(write_report(replace(results, cases=results.cases.assign(dice=0.00042)), tmp_path))
    (text,) = (a["alt"] for tag, a in page.tags if tag == "img" and "Dot plot" in a["alt"])
    assert text.count(": 0.00042") == 3


def test_the_examples_say_which_initialisations_they_show(tmp_path):
    results = study_results((4,))
    (example,) = results.examples
    assert "Of the initialisations one of each kind" in Page(write_report(results, tmp_path)).text
    every = dict.fromkeys(results.methods.values())
    whole = replace(example, predictions=dict.fromkeys(every, example.truth), dice=dict.fromkeys(every, 0.5))
    shown = Page(write_report(replace(results, examples=(whole,)), tmp_path)).text
    assert "All initialisations are shown." in shown
    assert "one of each kind" not in shown


def test_names_are_taken_as_they_are(tmp_path):
    results = study_results()
    image, labels = results.examples[0].image, results.examples[0].truth
    odd = study_results(
        title=EVIL,
        notes=(EVIL,),
        facts=((EVIL, EVIL),),
        cases=results.cases.replace("WT", EVIL),
        examples=(Example(EVIL, EVIL, image, labels, {EVIL: labels}, {EVIL: 0.7}),),
        labels={2: EVIL},
    )
    page = Page(write_report(odd, tmp_path))
    assert "$x_{$[/bold]<b>\\x1b[31m" in page.text
    assert "b" not in {tag for tag, _ in page.tags}
    assert "\x1b" not in page.text


def test_same_results_give_the_same_bytes(tmp_path):
    one, other = (write_report(study_results(), tmp_path / name) for name in "ab")
    assert one.read_bytes() == other.read_bytes()


def test_a_study_of_one_method_without_ratios_and_curves(tmp_path):
    results = study_results((4,), (0,), (0,), {"scratch": 0.0}, references=())
    bare = study_results(
        (4,),
        (0,),
        (0,),
        {"scratch": 0.0},
        references=(),
        curves=results.curves[:0],
        forgetting=results.forgetting[:0],
        trainings=frame([["Fine-tuning", 4, 20, 5.0, float("nan"), 3.0]], list(results.trainings)),
        examples=(),
    )
    text = Page(write_report(bare, tmp_path)).text
    assert "Forgetting" not in text
    assert "All comparisons" not in text
    assert "There is one run of each method" in text
