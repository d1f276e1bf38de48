"""Texts that people and programs write, read with bounds: JSON, YAML and CSV, and values checked by a model.

Whatever a file holds, a reader here returns plain values or raises one `InputError`: no file is read beyond
`MOST_BYTES`, no value is nested beyond `MOST_DEPTH`, and no YAML alias multiplies beyond `MOST_VALUES`.
"""

import csv
import io
import json
import math
import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, is_dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar, cast, get_args, get_type_hints

from timm_ext.errors import InputError, listed, shown
from timm_ext.files import check_file, reading

MOST_BYTES = 32 << 20
MOST_YAML_BYTES = 1 << 20
MOST_DEPTH = 64
MOST_VALUES = 100_000
MOST_DIGITS = 100

Location = tuple[int | str, ...]
Kind = TypeVar("Kind")

READ = "read"
"""Context of values that were read: a text may be a number, as YAML takes 1e-3 for a text."""
OTHER_FORM = "other_form"
"""Type of the error of a value that is nothing like what its field holds."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Row:
    """A row of a CSV file: the line it ends on, and its cells that are not empty, by column."""

    line: int
    cells: dict[str, str]


def read_text(path: Path | str, *, most: int = MOST_BYTES) -> str:
    """Read a text file in UTF-8; a byte order mark is dropped.

    Raises:
        InputError: no regular file, more than `most` bytes, other bytes than UTF-8 or a NUL.
    """
    check_file(path)
    with reading(path), open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise InputError(f"{path}: expected at most {most >> 20} MiB of text (got more)")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: expected text in UTF-8 (got byte {data[error.start]:#04x} at {error.start})"
        ) from error
    if "\0" in text:
        raise InputError(f"{path}: expected text (got a NUL character at {text.index(chr(0))})")
    return text


def read_json(path: Path | str) -> Any:
    """Read a JSON file; see `parse_json`.

    Raises:
        InputError: the file cannot be read, or is not JSON.
    """
    return parse_json(read_text(path), path)


def parse_json(text: str, where: object) -> Any:
    """Turn JSON into values.

    Args:
        text: the document.
        where: the file, for the message.

    Raises:
        InputError: no JSON, a key twice in one object, `NaN` or infinite numbers, numbers of more than
            `MOST_DIGITS` digits, half of a surrogate pair, or more than `MOST_DEPTH` levels.
    """
    try:
        value = json.loads(
            text,
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=_refuse_constant,
            object_pairs_hook=_without_repeats,
        )
        deep = _is_deep(value)
        if _SURROGATE.search(text) and not deep:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        deep = True
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: expected JSON (got half of a surrogate pair)") from error
    except ValueError as error:
        raise InputError(f"{where}: expected JSON (got {shown(error)})") from error
    if deep:
        raise InputError(f"{where}: expected JSON of at most {MOST_DEPTH} levels (got more)")
    return value


def read_yaml(path: Path | str) -> tuple[Any, dict[Location, int]]:
    """Read a YAML file; see `parse_yaml`.

    Returns:
        Its value, and the line of every key by its place in the value.

    Raises:
        InputError: the file cannot be read, or is not YAML of plain values.
    """
    text = read_text(path, most=MOST_YAML_BYTES)
    value = parse_yaml(text, path)
    from timm_ext.documents._yaml import key_lines

    return value, key_lines(text)


def parse_yaml(text: str, where: object) -> Any:
    """Turn YAML into plain values: null, truth values, numbers, texts, lists and mappings. Dates stay texts.

    Args:
        text: one document.
        where: the file or option, for the message.

    Raises:
        InputError: no YAML, other tags, a key twice in one mapping, numbers of more than `MOST_DIGITS`
            characters, more than `MOST_DEPTH` levels, or more than `MOST_VALUES` values, aliases put in.
    """
    from timm_ext.documents._yaml import plain_values

    try:
        return plain_values(text, most_depth=MOST_DEPTH, most_values=MOST_VALUES, most_digits=MOST_DIGITS)
    except ValueError as error:
        raise InputError(f"{where}: expected YAML of plain values (got {shown(error)})") from error


def read_csv(path: Path | str, *, delimiter: str = ",") -> list[Row]:
    """Read a CSV file whose first row names the columns; rows without any content are left out.

    Args:
        path: the file.
        delimiter: between cells; a tab in TSV files.

    Raises:
        InputError: the file cannot be read, is not CSV, has a column twice or without a name, or a row with
            more cells than there are columns.
    """
    text = io.StringIO(read_text(path), newline="")
    reader = csv.reader(text, delimiter=delimiter, skipinitialspace=True, strict=True)
    columns: list[str] | None = None
    rows = []
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if columns is None:
                columns = _columns(cells, path)
            else:
                rows.append(_row(cells, columns, reader.line_num, path))
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: expected CSV (got {shown(error)})") from error
    return rows


def validated(
    kind: type[Kind],
    value: Any,
    where: object,
    *,
    lines: Mapping[Location, str] | None = None,
    forms: Mapping[Location, str] | None = None,
    strict: bool = False,
) -> Kind:
    """Check a value against a model and return it as one.

    Args:
        kind: a pydantic model, a dataclass, or any type that pydantic takes.
        value: JSON values, as a reader of this module returns them.
        where: the file or section, for the message.
        lines: of the places in `value` that are known better than `where`: what to say instead of it.
        forms: of the places in `value` that may be written in several ways: which they are.
        strict: take no number for a text, no text for a number and no truth value for either.

    Raises:
        InputError: the value does not fit; the message names the first field that does not.
    """
    from pydantic import ValidationError

    try:
        if strict:
            text = json.dumps(value)
            fitting: Kind = _adapter(cast(Hashable, kind)).validate_json(text, strict=True, context=READ)
        else:
            fitting = _adapter(cast(Hashable, kind)).validate_python(value, context=READ)
    except ValidationError as error:
        raise refusal(error, kind, where, lines=lines or {}, forms=forms or {}) from error
    return fitting


@cache
def _adapter(kind: Hashable) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(cast(Any, kind))


def _is_deep(value: Any) -> bool:
    """Whether lists and objects are nested beyond `MOST_DEPTH`."""
    level = [value]
    for _ in range(MOST_DEPTH + 1):
        inner = [node for node in level if isinstance(node, (dict, list))]
        if not inner:
            return False
        level = [child for node in inner for child in (node.values() if isinstance(node, dict) else node)]
    return True


def _whole(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {shown(text)}, which is too large")
    return value


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text}, which is no number in JSON")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} twice in one object")
    return values


def _columns(cells: list[str], path: Path | str) -> list[str]:
    columns = [cell.strip() for cell in cells]
    while columns and not columns[-1]:
        columns.pop()
    if "" in columns or len(set(columns)) != len(columns):
        raise InputError(f"{path}: expected a different name for each column (got {shown(columns)})")
    return columns


def _row(cells: list[str], columns: list[str], line: int, path: Path | str) -> Row:
    if extra := [cell for cell in cells[len(columns) :] if cell.strip()]:
        raise InputError(
            f"{path}, line {line}: expected at most {len(columns)} cells, for the columns "
            f"{shown(', '.join(columns))} (got more: {shown(', '.join(extra))})"
        )
    filled = {name: cell for name, cell in zip(columns, cells, strict=False) if cell.strip()}
    return Row(line, filled)


def refusal(
    error: Any,
    kind: Any,
    where: object,
    *,
    lines: Mapping[Location, str] = MappingProxyType({}),
    forms: Mapping[Location, str] = MappingProxyType({}),
) -> InputError:
    """Put pydantic's error about a model into the one message of `validated`; arguments are those of it."""
    from pydantic import BaseModel
    from pydantic_core import ArgsKwargs

    default = str(where)
    problem = error.errors(include_url=False)[0]
    location: Location = problem["loc"]
    if is_dataclass(kind) and location and isinstance(location[0], int):
        default += " (fields are given by name)"
        location = (*[*_fields_of(kind)][location[0] : location[0] + 1], *location[1:])
    told, got = _in_our_words(problem), f" (got {shown(repr(problem['input']))})"
    if location and location[-1] == "[key]":
        location, told = location[:-2], "expected texts as names"
    known = next((location[:n] for n in range(len(location), 0, -1) if location[:n] in lines), location)
    name = shown(".".join(map(str, known)))
    place = lines.get(known, default)
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        expected = listed(_field_names(kind, location[:-1]), most=100)
        found = [
            f"{part}.{location[-1]}"
            for part, inner in _fields_of(kind).items()
            if location[-1] in _fields_of(inner)
        ]
        expected += f"; there is {listed(found)}" if found else ""
        return InputError(f"{place}: unknown field {name} (expected one of {expected})")
    if problem["type"] == OTHER_FORM and (form := forms.get(location[:2])):
        told = f"expected {form}"
    if isinstance(problem["input"], (dict, BaseModel, ArgsKwargs)) or " (got " in told:
        got = ""
    return InputError(f"{place}{f': {name}' if name else ''}: {told}{got}")


def _in_our_words(problem: Mapping[str, Any]) -> str:
    words = {
        "dataclass_type": "expected named fields",
        "model_type": "expected named fields",
        "model_attributes_type": "expected named fields",
        "dict_type": "expected named fields",
        "missing": "missing",
        "missing_argument": "missing",
        "multiple_argument_values": "expected once",
        "unexpected_positional_argument": "expected no more values",
    }
    facts = problem.get("ctx", {})
    if told := words.get(problem["type"]):
        return told
    if problem["type"] in ("too_short", "too_long"):
        bound = f"least {facts['min_length']}" if "min_length" in facts else f"most {facts['max_length']}"
        told = f"expected at {bound} (got {facts['actual_length'] or 'none'})"
        return told.replace("least 1 ", "least one ")
    if isinstance(facts.get("error"), InputError):
        return str(facts["error"])
    message = shown(problem["msg"].removeprefix("Value error, "))
    return f"expected {rest}" if (rest := message.removeprefix("Input should be ")) != message else message


def _field_names(kind: Any, location: Location) -> list[str]:
    """Return the names of the fields at a place in a model; none where the place is no model."""
    for part in location:
        types = [kind, *get_args(kind)]  # of a list or a choice, the model in it
        inner = (known[str(part)] for known in map(_fields_of, types) if str(part) in known)
        kind = next(inner, next(filter(_fields_of, types), kind))
    return list(_fields_of(kind))


def _fields_of(kind: Any) -> dict[str, Any]:
    if is_dataclass(kind):
        return get_type_hints(kind)
    return {name: field.annotation for name, field in getattr(kind, "model_fields", {}).items()}
