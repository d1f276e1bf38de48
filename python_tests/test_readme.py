"""README and docs: short enough, their code does what it says, their figures are those of the results."""

import importlib
import re
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from timm_ext.cli.app import app
from timm_ext.data.tasks import get_task, task_from_dict
from timm_ext.networks import load_network, registry

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture
def text():
    return README.read_text(encoding="utf-8")


@pytest.fixture
def documents(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.pages").documents()


def blocks_of(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def test_it_is_short_and_begins_with_the_essentials(text):
    assert len(text.splitlines()) < 150
    assert len(text[: text.index("\n## ")].splitlines()) <= 40
    places = [
        text.index(wanted)
        for wanted in (
            "pip install . && timm-ext demo",
            'pip install ".[test]" && pytest -n auto',
            "![",
            "timm-ext train",
            "fused_merge(theta",
            "equivalent",
            "## Reading on",
        )
    ]
    assert places == sorted(places)


def test_the_example_is_equivalent_to_plain_pytorch():
    example, equivalent = blocks_of(README)
    names: dict[str, object] = {}
    exec(example, names)
    merged = names["merged"]
    exec(equivalent, names)
    assert merged is not names["merged"]
    torch.testing.assert_close(merged, names["merged"])
    (plain,) = torch.autograd.grad(names["merged"].square().sum(), names["logits"])
    torch.testing.assert_close(names["logits"].grad, plain, rtol=1e-4, atol=1e-5)


def test_every_block_of_the_page_on_networks_runs_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks_of(ROOT / "docs" / "networks.md"):
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


def test_the_network_of_the_page_on_monai_is_built_by_its_name(monkeypatch):
    monkeypatch.setattr(registry, "_SPECS", dict(registry._SPECS))
    (block,) = blocks_of(ROOT / "docs" / "monai.md")
    exec(block, {})
    network = registry.build_network("mine", in_channels=2, out_channels=3, width=4)
    assert network(torch.zeros(1, 2, 4, 4, 4)).shape == (1, 3, 4, 4, 4)


def test_no_other_page_for_users_has_code_that_is_not_run():
    users = [path for path in PAGES if path.name != "CONTRIBUTING.md"]
    assert [path.name for path in users if blocks_of(path)] == ["README.md", "monai.md", "networks.md"]


def test_the_table_of_commands_has_every_command_once():
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    table = text[text.index("| command |") :]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`([\w-]+)`", row)]
    assert sorted(named) == sorted(get_command(app).commands)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_headings_that_a_page_links_to_exist(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, heading = target.partition("#")
        found = (page.parent / path).resolve()
        assert found.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]


def test_pages_of_benchmarks_are_those_that_their_results_make(documents):
    for path, made in documents.items():
        assert path.read_text(encoding="utf-8") == made, f"{path.name}: run `python -m benchmarks.pages`"
    pages = {path for path in documents if path != README}
    assert pages == set((ROOT / "docs" / "benchmarks").glob("*.md"))


def test_the_readme_has_a_line_for_each_benchmark(documents, text):
    for path in documents.keys() - {README}:
        assert f"]({path.relative_to(ROOT)})" in text


def test_all_results_are_on_a_page():
    pages = "".join(path.read_text(encoding="utf-8") for path in PAGES if path.parent.name == "benchmarks")
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert f"results/{path.name})" in pages


def test_figures_change_with_their_results(documents, monkeypatch):
    tables = importlib.import_module("benchmarks.pages.speed")
    read = tables.read_json

    def slower(name):
        result = read(name)
        result["rows"][0]["milliseconds"]["fused_forward"] = 1234.5
        return result

    monkeypatch.setattr(tables, "read_json", slower)
    assert "1234.5 ms" in tables.merge()["tables"][8260000]
