"""Fields of settings: types that pydantic checks, and classes whose refusal is one clear error."""

import math
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, ValidationError

from timm_ext.documents import refusal
from timm_ext.documents.bounds import MOST_BATCH, MOST_CASES, MOST_EDGE, MOST_SEED, MOST_STEPS, MOST_WORKERS

Kind = TypeVar("Kind")


def whole(least: int, most: int) -> AfterValidator:
    """Take whole numbers from `least` to `most`."""

    def check(value: int) -> int:
        if not least <= value <= most:
            raise ValueError(f"expected a whole number from {least} to {most}")
        return value

    return AfterValidator(check)


def number(
    least: float, most: float = math.inf, *, above: bool = False, below: float = math.inf
) -> AfterValidator:
    """Take finite numbers from `least`, or only `above` it, to `most`, or to what is `below` a number."""
    words = f"greater than {least:g}" if above else f"at least {least:g}"
    words += "" if math.isinf(most) else f" and at most {most:g}"
    words += "" if math.isinf(below) else f" and less than {below:g}"

    def check(value: float) -> float:
        if not (least <= value <= most and value < below) or (above and value == least):
            raise ValueError(f"expected a finite number {words}")
        return value

    return AfterValidator(check)


Steps = Annotated[int, whole(1, MOST_STEPS)]
Batch = Annotated[int, whole(1, MOST_BATCH)]
Workers = Annotated[int, whole(0, MOST_WORKERS)]
Seed = Annotated[int, whole(0, MOST_SEED)]
Cases = Annotated[int, whole(1, MOST_CASES)]
Edge = Annotated[int, whole(1, MOST_EDGE)]
Edges = tuple[Edge, Edge, Edge]
Rate = Annotated[float, number(0, above=True)]
Weight = Annotated[float, number(0)]
Share = Annotated[float, number(0, below=1)]


def refused_as(name: str) -> Callable[[type[Kind]], type[Kind]]:
    """Let a pydantic dataclass raise `InputError` where it is called with what does not fit.

    Args:
        name: begins the message.
    """

    def decorate(kind: type[Kind]) -> type[Kind]:
        make: Any = kind.__init__

        @wraps(make)
        def checked(self: Kind, *values: Any, **fields: Any) -> None:
            try:
                make(self, *values, **fields)
            except ValidationError as error:
                raise refusal(error, kind, name) from error

        kind.__init__ = checked  # type: ignore[method-assign,assignment]
        return kind

    return decorate
