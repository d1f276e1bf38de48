"""YAML of plain values: what PyYAML's safe loader reads, without what can hang, multiply or surprise."""

import math
from typing import Any, cast

import yaml
from yaml.constructor import ConstructorError, SafeConstructor
from yaml.events import AliasEvent, MappingStartEvent, NodeEvent, ScalarEvent, SequenceStartEvent
from yaml.nodes import MappingNode, Node, ScalarNode

Location = tuple[int | str, ...]

_BASE: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"


class _Loader(_BASE):  # type: ignore[misc]
    """Plain values only; a value that does not fit its tag is an error of YAML, not of Python."""

    most_digits = 100

    def number(self, node: ScalarNode) -> int | float:
        """Construct a whole or decimal number."""
        if len(node.value) > self.most_digits:
            raise ConstructorError(None, None, f"a number of {len(node.value)} characters", node.start_mark)
        whole = node.tag == f"{_TAG}int"
        make = SafeConstructor.construct_yaml_int if whole else SafeConstructor.construct_yaml_float
        try:
            return make(self, node)
        except (ValueError, IndexError, OverflowError) as error:
            raise _misfit(node) from error

    def truth(self, node: ScalarNode) -> bool:
        """Construct a truth value."""
        name = str(self.construct_scalar(node)).lower()
        if name not in self.bool_values:
            raise _misfit(node)
        return bool(self.bool_values[name])

    def text(self, node: ScalarNode) -> str:
        """Construct a text."""
        value = str(self.construct_scalar(node))
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise ConstructorError(None, None, "half of a surrogate pair", node.start_mark)
        return value

    def mapping(self, node: MappingNode) -> dict[Any, Any]:
        """Construct a mapping without repeated keys; those of a merge (`<<`) may be overridden."""
        if not isinstance(node, MappingNode):
            raise _misfit(node)
        own = [key.value for key, _ in node.value if isinstance(key, ScalarNode)]
        if len(set(own)) < len(own):
            twice = next(name for name in own if own.count(name) > 1)
            raise ConstructorError(None, None, f"the key {twice!r} twice in one mapping", node.start_mark)
        return cast("dict[Any, Any]", self.construct_mapping(node, deep=True))

    def sequence(self, node: Node) -> list[Any]:
        """Construct a list."""
        return cast("list[Any]", self.construct_sequence(node, deep=True))


_Loader.yaml_constructors = {
    f"{_TAG}null": SafeConstructor.construct_yaml_null,
    f"{_TAG}bool": _Loader.truth,
    f"{_TAG}int": _Loader.number,
    f"{_TAG}float": _Loader.number,
    f"{_TAG}str": _Loader.text,
    f"{_TAG}seq": _Loader.sequence,
    f"{_TAG}map": _Loader.mapping,
    None: SafeConstructor.construct_undefined,
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != f"{_TAG}timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def plain_values(text: str, *, most_depth: int, most_values: int, most_digits: int) -> Any:
    """Construct the one document of `text`.

    Raises:
        ValueError: as `timm_ext.documents.parse_yaml` says; the message says what came and where.
    """
    try:
        _check_size(text, most_depth, most_values)
        loader = _Loader(text)
        loader.most_digits = most_digits
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(_one_line(error)) from error


def key_lines(text: str) -> dict[Location, int]:
    """Return the line of every key of a document that `plain_values` reads, by its place in the value."""
    lines: dict[Location, int] = {}

    def note(node: Node | None, location: Location) -> None:
        if isinstance(node, MappingNode):
            for key, value in node.value:
                inner = (*location, str(key.value))
                lines[inner] = key.start_mark.line + 1
                note(value, inner)

    note(yaml.compose(text, Loader=_Loader), ())
    return lines


def _check_size(text: str, most_depth: int, most_values: int) -> None:
    """Walk over the events, which takes no recursion, and count what aliases stand for."""
    sizes: dict[str | None, float] = {}  # of anchors; NaN while the node is open
    open_nodes: list[tuple[str | None, float]] = []
    total = 0.0
    for event in yaml.parse(text, Loader=_BASE):
        if isinstance(event, AliasEvent):
            size = sizes.get(event.anchor, 0.0)
            if math.isnan(size):
                raise ValueError(f"the alias *{event.anchor} inside of what it stands for")
            total += size
        elif isinstance(event, (MappingStartEvent, SequenceStartEvent)):
            if len(open_nodes) >= most_depth:
                raise ValueError(f"more than {most_depth} levels")
            open_nodes.append((event.anchor, total))
            _note(sizes, event, math.nan)
            total += 1
        elif isinstance(event, ScalarEvent):
            total += 1
            _note(sizes, event, 1.0)
        elif isinstance(event, yaml.events.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = total - before
        if total > most_values:
            raise ValueError(f"more than {most_values} values, those that aliases stand for among them")


def _note(sizes: dict[str | None, float], event: NodeEvent, size: float) -> None:
    if event.anchor is not None:
        sizes[event.anchor] = size


def _misfit(node: Node) -> ConstructorError:
    kind = node.tag.removeprefix(_TAG)
    value = repr(node.value) if isinstance(node, ScalarNode) else "a collection"
    return ConstructorError(None, None, f"{value}, which is no {kind}", node.start_mark)


def _one_line(error: yaml.YAMLError) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    text = " ".join(str(problem or error).split())
    return f"{text}, line {mark.line + 1}" if mark is not None else text
