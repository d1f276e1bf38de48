"""The command that runs a study: what it refuses before it lays out a step."""

import pytest
from cli_cases import failure


@pytest.mark.parametrize(
    ("plan", "given", "told"),
    [
        ("hippocampus", [], "Task04_Hippocampus: no such .* which the plan has for target_data"),
        ("hippocampus", ["--target-data", "."], "heads: no such .* for source_data (--source-data names"),
        ("brats", ["--target-data", "x"], "x: no such .* for target_data (--target-data names"),
    ],
)
def test_data_that_are_not_there_are_told_with_the_option_that_names_others(
    tmp_path, capsys, monkeypatch, plan, given, told
):
    monkeypatch.chdir(tmp_path)
    error = failure(capsys, ["study", plan, "--dry-run", "--out", tmp_path / "out", *given])
    for part in told.split(" .* "):
        assert part in error


def test_data_of_single_sources_are_looked_for_and_those_that_none_uses_are_not(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    plan = """
train_cases: [4]
source_data: unused
sources:
  - {task: parcellation-1-7, data: .}
  - {task: parcellation-8-14, data: lost}
"""
    (tmp_path / "plan.yaml").write_text(plan)
    given = ["study", tmp_path / "plan.yaml", "--dry-run", "--out", tmp_path / "out"]
    error = failure(capsys, given)
    assert "lost: no such file or folder, which the plan has for data of source 2" in error
    (tmp_path / "lost").mkdir()
    assert "unused" not in failure(capsys, given)


def test_a_target_that_is_generated_is_not_downloaded(tmp_path, capsys):
    error = failure(capsys, ["study", "smoke", "--download", "--out", tmp_path / "out"])
    assert "target_data: expected a data set to download (got none: its cases are generated)" in error
