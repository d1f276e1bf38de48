from types import SimpleNamespace

import pytest

from timm_ext.planning import budget
from timm_ext.planning.budget import held_bytes, keep_in_memory

CASE = SimpleNamespace(shape=(10, 10, 10), has_label=True)
ONE = 1000 * (2 * 4 + 1)  # bytes: two channels of float32 and a label of uint8


@pytest.mark.parametrize(
    ("total", "processes", "kept"),
    [(4 * 3 * ONE, 1, True), (4 * 3 * ONE - 4, 1, False), (4 * 3 * ONE, 2, False)],
)
def test_cases_are_held_in_a_quarter_of_the_memory(monkeypatch, total, processes, kept):
    monkeypatch.setattr(budget, "total_memory", lambda: total)
    cases = [CASE] * 3
    assert keep_in_memory(cases, 2, processes) is kept
    assert held_bytes(cases, 2, processes) == (3 * ONE if kept else 0)
