import pickle

import pytest

from timm_ext.errors import InputError, lines_of, listed, shown


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


def test_names_cannot_steer_the_terminal():
    evil = "a\x1b[31m\nb\r\u202e\ud800"
    for message in (f"{evil}: expected a name", f"two:{lines_of([evil, evil])}", f"x: {listed([evil])}"):
        text = str(InputError(message))
        assert all(line.isprintable() for line in text.splitlines())
        assert "\\x1b[31m\\nb\\r\\u202e\\ud800" in text
    assert str(InputError(f"two:{lines_of(['ü', 'b'])}")) == "two:\n  ü\n  b"
    assert str(InputError(str(InputError(evil)))) == str(InputError(evil))  # as after a way through a pipe
    assert str(pickle.loads(pickle.dumps(InputError(evil)))) == str(InputError(evil))


def test_the_middle_of_an_endless_line_is_left_out():
    text = str(InputError(f"{'y/' * 3000}a.yaml: cannot be read"))
    assert len(text) < 1600
    assert text.startswith("y/y/")
    assert text.endswith("y/a.yaml: cannot be read")
    assert str(InputError(text)) == text
    long = "x" * 1490
    assert str(InputError(f"{long}\n  {long}")) == f"{long}\n  {long}"


def test_a_long_value_is_shown_by_its_beginning():
    assert shown("a\n b") == "a b"
    assert shown("x" * 300) == "x" * 200 + "… (300 characters)"
    assert shown("\x00") == "\\x00"
