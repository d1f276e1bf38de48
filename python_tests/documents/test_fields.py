import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated

import numpy as np
import pytest
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from timm_ext.documents import validated
from timm_ext.documents.fields import Edges, Flag, Number, number, refused_as, whole, written_as
from timm_ext.errors import InputError


@refused_as("garden")
@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Garden:
    trees: Annotated[int, whole(1, 9)] = 3
    shade: Annotated[float, number(0, below=1)] = 0.5
    area: Annotated[float, number(0, above=True)] = 1.0
    walls: tuple[int, ...] = ()
    open: Flag = True
    plot: Edges = (1, 1, 1)
    fence: Annotated[Number | tuple[Number, Number], written_as("one length or two")] = 1.0
    beds: Annotated[tuple[str, ...], Field(min_length=1, max_length=2)] = ("roses",)
    names: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if self.trees > 8 and self.walls:
            raise ValueError("expected few trees within walls")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trees": 0}, r"trees: expected a whole number from 1 to 9 \(got 0\)"),
        ({"trees": 10}, r"trees: expected a whole number from 1 to 9 \(got 10\)"),
        ({"shade": 1.0}, r"shade: expected a finite number at least 0 and less than 1 \(got 1.0\)"),
        ({"shade": math.nan}, r"shade: expected a finite number at least 0 and less than 1 \(got nan\)"),
        ({"area": 0}, r"area: expected a finite number greater than 0 \(got 0\)"),
        ({"area": math.inf}, r"area: expected a finite number greater than 0 \(got inf\)"),
        ({"trees": 9, "walls": (1,)}, r"expected few trees within walls"),
        ({"trees": 0, "shade": 2}, r"trees: expected a whole number from 1 to 9 \(got 0\)"),
        ({"plot": (1, 2)}, r"plot: expected three numbers of voxels \(got \(1, 2\)\)"),
        ({"plot": (1, 2, 3, 4)}, r"plot: expected three numbers of voxels \(got \(1, 2, 3, 4\)\)"),
        ({"plot": 64}, r"plot: expected three numbers of voxels \(got 64\)"),
        ({"plot": (1, 0, 2)}, r"plot: expected a whole number from 1 to 4096 \(got 0\)"),
        ({"fence": "high"}, r"fence: expected one length or two \(got 'high'\)"),
        ({"fence": (1, 2, 3)}, r"fence: expected one length or two \(got \(1, 2, 3\)\)"),
        ({"beds": ()}, r"beds: expected at least one \(got none\)"),
        ({"beds": ("a",) * 3}, r"beds: expected at most 2 \(got 3\)"),
        ({"names": {1: "a"}}, r"names: expected texts as names \(got 1\)"),
    ],
)
def test_what_does_not_fit_is_one_error_in_python_and_from_a_file(changes, message):
    with pytest.raises(InputError, match=f"^garden: {message}$"):
        Garden(**changes)
    with pytest.raises(InputError, match=f"^a.yaml, line 2: {message}$"):
        validated(Garden, changes, "a.yaml, line 2")


def test_an_unknown_field_is_named_with_those_there_are():
    with pytest.raises(InputError, match=r"^garden: unknown field pond \(expected one of trees, shade, "):
        Garden(pond=1)


def test_values_become_those_of_the_fields():
    assert Garden(trees=4, walls=[1, 2]) == replace(Garden(walls=(1, 2)), trees=4)
    with pytest.raises(InputError, match="garden: trees: expected a whole number"):
        replace(Garden(), trees=0)


@pytest.mark.parametrize(
    ("field", "value", "read"),
    [
        ("trees", True, 1),
        ("trees", "4", 4),
        ("trees", b"4", 4),
        ("trees", 4.0, 4),
        ("plot", (1, "2", 3), (1, 2, 3)),
        ("shade", "1e-1", 0.1),
        ("shade", False, 0.0),
        ("area", b"1", 1.0),
        ("fence", "2", 2.0),
        ("fence", True, 1.0),
        ("open", "no", False),
        ("open", 0, False),
    ],
)
def test_only_what_was_read_is_taken_for_another_type(field, value, read):
    with pytest.raises(InputError, match=f"^garden: {field}: expected "):
        Garden(**{field: value})
    with pytest.raises(InputError, match=f"^garden: {field}: expected "):
        replace(Garden(), **{field: value})
    assert getattr(validated(Garden, {field: value}, "a.yaml"), field) == read


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("trees", np.int64(4), int),
        ("shade", np.float32(0.25), float),
        ("shade", 0, float),
        ("area", 3, float),
    ],
)
def test_numbers_of_other_kinds_become_those_of_python(field, value, kind):
    got = getattr(Garden(**{field: value}), field)
    assert type(got) is kind
    assert got == value


def test_a_value_without_a_name_is_refused_by_the_name_of_its_field():
    assert Garden(4).trees == 4
    with pytest.raises(InputError, match=r"^garden \(fields are given by name\): shade: .* \(got 'a'\)$"):
        Garden(4, "a")
    with pytest.raises(InputError, match=r"^garden \(fields are given by name\): expected no more values"):
        Garden(*[1, 0.5, 1.0, (), True, (1, 1, 1), 1.0, ("a",), None, "more"])
    with pytest.raises(InputError, match=r"garden.*trees: expected once"):
        Garden(4, trees=4)
