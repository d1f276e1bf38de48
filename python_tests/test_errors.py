import pytest

from timm_ext.errors import lines_of, listed


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, ""), (1, "0"), (2, "0, 1"), (3, "0, 1, and 1 more"), (1251, "0, 1, and 1249 more")],
)
def test_a_long_list_is_cut_and_says_how_much_is_missing(count: int, expected: str) -> None:
    assert listed(range(count), most=2) == expected


def test_lines_are_indented_and_cut_at_ten() -> None:
    assert lines_of(["a", "b"]) == "\n  a\n  b"
    assert lines_of(range(12)).splitlines()[-1] == "  and 2 more"
    assert len(lines_of(range(12)).splitlines()) == 12
