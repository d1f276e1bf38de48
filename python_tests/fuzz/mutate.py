"""Damage to bytes, texts and trees of JSON values, drawn from a generator."""

import copy
import random
from typing import Any

ODD_NAMES = [
    "",
    " ",
    ".",
    "..",
    "a/b",
    "/etc/passwd",
    "[/bold]",
    "[red]x",
    "a\nb",
    "\x1b[31mred\x1b[0m",
    "\x00",
    "ü±",
    "\u202eabc",
    "\ud800",
    "x" * 300,
    "-o",
    "{0}%s",
]
ODD_NUMBERS: list[Any] = [
    0,
    -1,
    1,
    2,
    255,
    256,
    1e-300,
    1e300,
    0.5,
    2**31,
    2**53 + 1,
    2**63,
    -(2**63) - 1,
    10**400,
    float("nan"),
    float("inf"),
    -float("inf"),
]
ODD_VALUES: list[Any] = [
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    {"": None},
    {"a": {"b": []}},
    *ODD_NUMBERS,
    *ODD_NAMES,
]


def damaged(rng: random.Random, data: bytes, most: int = 4) -> bytes:
    """Return `data` with up to `most` flipped bits, changed, lost, added or repeated bytes, early ends."""
    result = bytearray(data)
    for _ in range(rng.randint(1, most)):
        _damage(rng, result)
    return bytes(result)


def _damage(rng: random.Random, data: bytearray) -> None:
    if not data:
        data += rng.randbytes(rng.randint(1, 16))
        return
    start = rng.randrange(len(data))
    stop = min(len(data), start + rng.choice([1, 2, 4, 8, 64, 1024]))
    match rng.randrange(7):
        case 0 | 1:
            data[start] ^= 1 << rng.randrange(8)
        case 2:
            data[start:stop] = rng.randbytes(stop - start)
        case 3:
            del data[start:stop]
        case 4:
            data[start:start] = rng.randbytes(stop - start)
        case 5:
            data[start:start] = data[start:stop]
        case _:
            del data[start:]


def odd_value(rng: random.Random) -> Any:
    """A value that hardly any field expects."""
    return copy.deepcopy(rng.choice(ODD_VALUES))


def damaged_tree(rng: random.Random, tree: Any, most: int = 3) -> Any:
    """Return a copy of a tree of dicts, lists and leaves with one to `most` changes.

    A change replaces a value by an odd or another one of the tree, drops or renames a key, drops, repeats or
    swaps items, or wraps a value.
    """
    tree = copy.deepcopy(tree)
    for _ in range(rng.randint(1, most)):
        places = list(_places(tree))
        if not places:
            return odd_value(rng)
        holder, key = rng.choice(places)
        _change(rng, holder, key, places)
    return tree


def _change(rng: random.Random, holder: Any, key: Any, places: list[tuple[Any, Any]]) -> None:
    match rng.randrange(6):
        case 0 | 1:
            holder[key] = odd_value(rng)
        case 2:
            other, name = rng.choice(places)
            holder[key] = copy.deepcopy(other[name])
        case 3:
            del holder[key]
        case 4:
            holder[key] = rng.choice([[holder[key]], {"a": holder[key]}, str(holder[key])])
        case _ if isinstance(holder, dict):
            holder[rng.choice(["extra", *map(str, ODD_NAMES)])] = holder.pop(key)
        case _:
            holder.insert(key, copy.deepcopy(holder[key]))


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (dict or list, key or index) of a tree."""
    found = []
    stack = [tree]
    while stack:
        node = stack.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            found.append((node, key))
            stack.append(node[key])
    return found
