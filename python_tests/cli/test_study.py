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
