"""Fields of settings: types that pydantic checks, and classes whose refusal is one clear error."""

import math
from collections.abc import Callable
from functools import wraps
from numbers import Real
from operator import index
from typing import Annotated, Any, TypeVar

from pydantic import (
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

from timm_ext.documents import OTHER_FORM, READ, refusal
from timm_ext.documents.bounds import MOST_BATCH, MOST_CASES, MOST_EDGE, MOST_SEED, MOST_STEPS, MOST_WORKERS
from timm_ext.errors import shown

Kind = TypeVar("Kind")


def whole(least: int, most: int) -> WrapValidator:
    """Take whole numbers from `least` to `most`; in Python no truth value, text or 1.0 for one."""
    words = f"expected a whole number from {least} to {most}"

    def check(value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> int:
        if info.context != READ and (isinstance(value, bool) or not hasattr(value, "__index__")):
            raise ValueError(words)
        fitting: int = _handled(handler, value if info.context == READ else index(value), words)
        if not least <= fitting <= most:
            raise ValueError(words)
        return fitting

    return WrapValidator(check)


def number(
    least: float, most: float = math.inf, *, above: bool = False, below: float = math.inf
) -> WrapValidator:
    """Take finite numbers from `least`, or only `above` it, to `most`, or to what is `below` a number.

    In Python no truth value and no text is taken for one.
    """
    limits = [] if math.isinf(least) else [f"greater than {least:g}" if above else f"at least {least:g}"]
    limits += [] if math.isinf(most) else [f"at most {most:g}"]
    limits += [] if math.isinf(below) else [f"less than {below:g}"]
    words = f"expected a finite number {' and '.join(limits)}".strip()

    def check(value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> float:
        if info.context != READ and (isinstance(value, bool) or not isinstance(value, Real)):
            raise ValueError(words)
        fitting: float = _handled(handler, value, words)
        if not (least <= fitting <= most and fitting < below) or (above and fitting == least):
            raise ValueError(words)
        return fitting

    return WrapValidator(check)


def _handled(handler: ValidatorFunctionWrapHandler, value: Any, words: str) -> Any:
    try:
        return handler(value)
    except ValidationError as error:
        raise ValueError(words) from error


def _truth(value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
    words = "expected True or False"
    if info.context != READ and not isinstance(value, bool):
        raise ValueError(words)
    return _handled(handler, value, words)


def written_as(words: str) -> WrapValidator:
    """Say of a tuple or a choice what it may be, where what came is nothing like it.

    An element that does not fit is told with its own words.
    """

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            if problem["type"] == "value_error" and [*map(type, problem["loc"])] == [int]:
                told, got = problem["ctx"]["error"], shown(repr(problem["input"]))
                raise ValueError(f"{told} (got {got})") from error
            raise PydanticCustomError(OTHER_FORM, f"expected {words}") from error

    return WrapValidator(check)


VOXELS = "three numbers of voxels"

Flag = Annotated[bool, WrapValidator(_truth)]
Number = Annotated[float, number(-math.inf)]
Steps = Annotated[int, whole(1, MOST_STEPS)]
Batch = Annotated[int, whole(1, MOST_BATCH)]
Workers = Annotated[int, whole(0, MOST_WORKERS)]
Seed = Annotated[int, whole(0, MOST_SEED)]
Cases = Annotated[int, whole(1, MOST_CASES)]
Edge = Annotated[int, whole(1, MOST_EDGE)]
Edges = Annotated[tuple[Edge, Edge, Edge], written_as(VOXELS)]
Rate = Annotated[float, number(0, above=True)]
Weight = Annotated[float, number(0)]
Share = Annotated[float, number(0, below=1)]
UpToOne = Annotated[float, number(0, 1)]


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
