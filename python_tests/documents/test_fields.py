import math
from dataclasses import replace
from typing import Annotated

import pytest
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from timm_ext.documents import validated
from timm_ext.documents.fields import number, refused_as, whole
from timm_ext.errors import InputError


@refused_as("garden")
@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Garden:
    trees: Annotated[int, whole(1, 9)] = 3
    shade: Annotated[float, number(0, below=1)] = 0.5
    area: Annotated[float, number(0, above=True)] = 1.0
    walls: tuple[int, ...] = ()

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
        ({"trees": 0, "shade": 2}, r"trees: expected a whole number from 1 to 9 \(got 0\) \(and 1 more\)"),
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
