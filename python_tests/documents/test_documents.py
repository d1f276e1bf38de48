"""Readers of JSON, YAML and CSV return plain values or one clear error, whatever a file holds."""

import os
from dataclasses import dataclass
from math import inf

import pytest
from pydantic import BaseModel, ConfigDict, Field

from timm_ext import documents
from timm_ext.documents import parse_json, parse_yaml, read_csv, read_json, read_text, read_yaml, validated
from timm_ext.errors import InputError

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
MERGES = "a0: &a0 {k: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 30)
)
DEEP = 100_000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("a: [1, 2.5, yes, ~, x, 1e-3, .inf]", {"a": [1, 2.5, True, None, "x", "1e-3", inf]}),
        ("when: 2001-99-99\nday: 2001-01-01", {"when": "2001-99-99", "day": "2001-01-01"}),
        (
            "base: &b {lr: 1, steps: 2}\nrun: {<<: *b, lr: 3}",
            {"base": {"lr": 1, "steps": 2}, "run": {"lr": 3, "steps": 2}},
        ),
        ("a: &x [1]\nb: [*x, *x]", {"a": [1], "b": [[1], [1]]}),
        ("!!int 3", 3),
        ("0b11", 3),
        ('"\\u00fc"', "ü"),
    ],
)
def test_yaml_of_plain_values(text, expected):
    assert parse_yaml(text, "x") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", r"expected YAML of plain values \(got did not find expected .*line 2"),
        ("a: 1\na: 2", "the key 'a' twice"),
        ("!!int x", "'x', which is no int, line 1"),
        ("a: 0b_", "'0b_', which is no int"),
        ("!!float x", "'x', which is no float"),
        ("!!bool x", "'x', which is no bool"),
        ("!!bool {}", "expected a scalar node"),
        ("!!map x", "a mapping|no map"),
        ("!!timestamp 2001-99-99", "could not determine a constructor"),
        ("!!set {a, b}", "could not determine a constructor"),
        ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("1" * 5000, "a number of 5000 characters"),
        ("[" * DEEP, "levels|nesting depth"),
        ("- " * 100, "more than 64 levels"),
        ("- " * DEEP, "levels|nesting depth"),
        (BOMB, "more than 100000 values, those that aliases stand for"),
        (MERGES, "more than 100000 values"),
        ("&a [*a]", "inside of what it stands for"),
        ("&a {b: {c: *a}}", "inside of what it stands for"),
        ("*a", "undefined alias"),
        ("? [a]\n: b", "unhashable key"),
        ("a: 1\n---\nb: 2", "single document|another document"),
        ("1:" * 90 + "1", "a number of 181 characters"),
        ("a\x1b[31m: [", "control characters|not allowed|special characters"),
    ],
)
def test_other_yaml_is_refused(text, message):
    with pytest.raises(InputError, match=message) as caught:
        parse_yaml(text, "plan.yaml")
    assert str(caught.value).startswith("plan.yaml: expected YAML of plain values (got ")
    assert len(str(caught.value)) < 400


def test_lines_of_keys(tmp_path):
    (tmp_path / "a.yaml").write_text("train:\n  lr: 1\n  steps: 2\n")
    values, lines = read_yaml(tmp_path / "a.yaml")
    assert values == {"train": {"lr": 1, "steps": 2}}
    assert lines == {("train",): 1, ("train", "lr"): 2, ("train", "steps"): 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON"),
        ("[" * DEEP, "more|levels"),
        ("[" * 65 + "]" * 65, r"at most 64 levels \(got more\)"),
        ('{"a":' * 70 + "1" + "}" * 70, "at most 64 levels"),
        ("NaN", "NaN, which is no number"),
        ("[-Infinity]", "Infinity, which is no number"),
        ("1e999", "too large"),
        ("1" * 5000, "a number of 5000 digits"),
        ('{"a": 1, "a": 2}', "the key 'a' twice"),
        ('["\\ud800"]', "half of a surrogate pair"),
    ],
)
def test_other_json_is_refused(text, message):
    with pytest.raises(InputError, match=message) as caught:
        parse_json(text, "record.json")
    assert str(caught.value).startswith("record.json: expected JSON")


def test_json():
    assert parse_json('{"a": [1, 2.5, null, "\\ud83d\\ude00"], "[[": "]"}', "x") == {
        "a": [1, 2.5, None, "😀"],
        "[[": "]",
    }
    assert parse_json("[" * 64 + "]" * 64, "x")


def test_csv(tmp_path):
    path = tmp_path / "cases.csv"
    path.write_bytes(
        '\ufeffid, T1 ,label,\r\na,"x,\ny.nii",,\r\n\r\n,,,\r\nb,z.nii, l.nii,\r\n,,,\r\n'.encode()
    )
    first, second = read_csv(path)
    assert (first.line, first.cells) == (3, {"id": "a", "T1": "x,\ny.nii"})
    assert (second.line, second.cells) == (6, {"id": "b", "T1": "z.nii", "label": "l.nii"})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"id,T1,T1\n", "a different name for each column"),
        (b"id,,T1\n", "a different name for each column"),
        (b"id,T1\na,b,c\n", r"line 2: expected at most 2 cells, for the columns id, T1 \(got more: c\)"),
        (b"id,T1\na," + b"x" * 200_000, "field larger than field limit"),
        (b'id,T1\na,"b\n', "line 2: expected CSV"),
        (b"id,T1\na,\0\n", "a NUL character"),
        ("id,T1\n".encode("utf-16"), "expected text in UTF-8"),
        (b"id,T1\n\xff", r"byte 0xff at 6"),
    ],
)
def test_other_csv_is_refused(tmp_path, data, message):
    (tmp_path / "cases.csv").write_bytes(data)
    with pytest.raises(InputError, match=message):
        read_csv(tmp_path / "cases.csv")


def test_what_is_no_file(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "large").write_text("x" * 100)
    for path, message in (
        (tmp_path, r"expected a file \(got a folder\)"),
        (tmp_path / "pipe", r"expected a file \(got a pipe or device\)"),
        ("/dev/zero", r"expected a file \(got a pipe or device\)"),
        (tmp_path / "absent", "cannot be read"),
        (tmp_path / "loop", "cannot be read"),
        (tmp_path / ("x" * 300), "cannot be read"),
        ("x/" * 4000, "cannot be read"),
        ("a\0b", "expected the name of a file"),
        ("a\ud800b", "expected the name of a file"),
    ):
        for read in (read_json, read_csv, read_yaml, read_text):
            with pytest.raises(InputError, match=message) as caught:
                read(path)
            assert len(str(caught.value).splitlines()) == 1
    monkeypatch.setattr(documents, "MOST_BYTES", 99)
    with pytest.raises(InputError, match="expected at most 0 MiB of text"):
        read_text(tmp_path / "large", most=99)
    assert len(read_text(tmp_path / "large", most=100)) == 100


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    count: int = Field(default=1, ge=0)


@dataclass(frozen=True)
class Outer:
    inner: Inner
    names: tuple[str, ...] = ()


def test_a_value_that_fits_becomes_the_model():
    value = {"inner": {"name": "a", "count": 2}, "names": ["b"]}
    for strict in (False, True):
        assert validated(Outer, value, "x", strict=strict) == Outer(Inner(name="a", count=2), ("b",))
    assert validated(Outer, {"inner": {"name": "a", "count": "2"}}, "x").inner.count == 2


@pytest.mark.parametrize(
    ("value", "strict", "message"),
    [
        (
            {"inner": {"name": "a", "count": -1}},
            False,
            r"^f\.json: inner\.count: expected greater than or equal to 0 \(got -1\)$",
        ),
        ({"inner": {"name": 1}}, False, r"^f\.json: inner\.name: expected a valid string \(got 1\)$"),
        ({"inner": {"name": "a", "count": "2"}}, True, r"^f\.json: inner\.count: .*integer \(got '2'\)$"),
        ({"inner": {"name": "a", "count": True}}, True, r"inner\.count: .*integer \(got True\)"),
        ({"inner": {}}, True, r"^f\.json: inner\.name: missing$"),
        ({"inner": {"name": 1, "count": "x"}, "names": 3}, True, r"inner\.name: .* \(got 1\)$"),
        (
            {"inner": {"name": "a", "nome": 1}},
            True,
            r"unknown field inner\.nome \(expected one of name, count\)",
        ),
        ([1], True, r"^f\.json: expected named fields \(got \[1\]\)$"),
        (None, False, r"^f\.json: expected named fields \(got None\)$"),
        ({"inner": {"name": ["x" * 9999]}}, True, r"\(\d+ characters\)"),
        ({"inner": {"name": {"\x1b[0m\n": 1}}}, True, r"^f\.json: inner\.name"),
    ],
)
def test_a_value_that_does_not_fit(value, strict, message):
    with pytest.raises(InputError, match=message) as caught:
        validated(Outer, value, "f.json", strict=strict)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 500


def test_a_line_is_named_where_it_is_known():
    lines = {("inner",): "f.yaml, line 1", ("inner", "count"): "f.yaml, line 3"}
    with pytest.raises(InputError, match=r"^f\.yaml, line 3: inner\.count: "):
        validated(Outer, {"inner": {"name": "a", "count": -1}}, "f.yaml", lines=lines)
