"""The README's first screen: short enough, and its code does what it says."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch

from timm_ext.data.tasks import get_task, task_from_dict
from timm_ext.networks import load_network

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


def test_every_block_runs_as_printed_one_after_the_other(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    saved, checkpoint = load_network(tmp_path / "m1.safetensors")
    assert task_from_dict(checkpoint.metadata["task"]) == get_task("parcellation-1-7")
    for mine, theirs in zip(saved.parameters(), names["theirs"].parameters(), strict=True):
        assert torch.equal(mine, theirs)
    means = fused_mean(names["bank"], names["layout"])
    for name, parameter in names["network"].named_parameters():
        if name in means:
            torch.testing.assert_close(parameter.detach(), means[name], rtol=1e-4, atol=1e-6)
    assert len(means) > 20


def fused_mean(bank, layout):
    """The Fisher-weighted mean in plain PyTorch: what a merge with equal logits folds into."""
    theta, fisher = bank.theta.double(), bank.fisher.double()
    total = fisher.sum(0)
    merged = torch.where(total > 0, (fisher * theta).sum(0) / total, theta.mean(0)).float()
    places = zip(layout.entries, layout.offsets, strict=True)
    return {e.name: merged[start : start + e.numel].reshape(e.shape) for e, start in places}


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
