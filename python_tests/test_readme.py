"""The README's first screen: short enough, and its code does what it says."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture
def text():
    return README.read_text(encoding="utf-8")


def test_the_first_screen_is_short_and_holds_the_essentials(text):
    first = text[: text.index("\n## ")]
    assert len(first.splitlines()) <= 40
    for wanted in (
        "pip install . && timm-ext demo",
        'pip install ".[test]" && pytest',
        "fused_merge",
        "![",
        "equivalent",
    ):
        assert wanted in first


def test_the_example_is_equivalent_to_plain_pytorch(text):
    example, equivalent = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[:2]
    names: dict[str, object] = {}
    exec(example, names)
    merged = names["merged"]
    exec(equivalent, names)
    assert merged is not names["merged"]
    torch.testing.assert_close(merged, names["merged"])
    (plain,) = torch.autograd.grad(names["merged"].square().sum(), names["logits"])
    torch.testing.assert_close(names["logits"].grad, plain, rtol=1e-4, atol=1e-5)


def test_files_that_the_readme_links_to_exist(text):
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (README.parent / target).exists(), target


def test_the_table_of_the_merge_is_that_of_its_result(text):
    benchmarks = README.parent / "benchmarks"
    table = runpy.run_path(str(benchmarks / "merge_table.py"))["table"]
    result = json.loads((benchmarks / "results" / "merge_cpu.json").read_text(encoding="utf-8"))
    assert table(result, result["rows"][0]["elements"]) in text


def test_the_table_of_the_fisher_is_that_of_its_result(text):
    benchmarks = README.parent / "benchmarks"
    table = runpy.run_path(str(benchmarks / "fisher_table.py"))["table"]
    result = json.loads((benchmarks / "results" / "fisher_cpu.json").read_text(encoding="utf-8"))
    assert table(result) in text
