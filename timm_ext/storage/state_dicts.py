"""Named tensors inside what training tools write: which of a file's entries they are, and their own names.

Tools nest the tensors of a network in records (`{"state_dict": …, "epoch": 3}`) and put names of wrappers in
front of the network's own (`module.`, `model.`). Which names are a network's own is known for certain only
where the network is: MONAI's UNet has tensors that begin with `model.` themselves.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timm_ext.errors import InputError, listed, shown
from timm_ext.system.machine import check_memory

# Where the tensors of a network lie in a record, the first that is there; averaged weights come last.
_NESTINGS = (
    *("state_dict", "model_state_dict", "network_state_dict", "network_weights"),
    *("network", "model", "net", "module", "weights", "state", "params"),
    *("ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "ema", "swa_state_dict", "swa_model"),
    *("averaged_model", "averaged"),
)
_OF_ONE_PROGRAM = ("network_weights",)  # where nnU-Net always has them: nothing to tell
_MOST_LEVELS = 6
# Parts that wrappers put into names, at any place: torch.compile, FSDP, activation checkpoints, DeepSpeed.
_PARTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
_AMBIGUOUS_PART = "module"  # of DataParallel around a part: networks have parts called so, too
_FRONTS = re.compile(r"(?:(?:module|ema_model|averaged_model)\.)*")  # what no network calls all of itself
_NO_WEIGHTS = ("optim", "lr_sched", "sched", "callback", "loops", "hyper", "metric", "logg", "scaler", "amp")
# Names of averaged weights, and of the network beside them that goes on changing.
_AVERAGED = re.compile(r"(?<![a-z])(ema|swa|averag(?:e|ed|es|ing)|teacher)(?![a-z])", re.IGNORECASE)
_BESIDE_AVERAGED = re.compile(r"(?<![a-z])online(?![a-z])", re.IGNORECASE)

Place = tuple[str, ...]
Values = Mapping[Any, Any]


@dataclass(frozen=True)
class StateDict:
    """Tensors by the names that a network has for them.

    Attributes:
        tensors: by name.
        notes: what was taken off or left out, in words; empty where nothing was.
    """

    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def find_state_dict(content: Any, path: Path, names: Collection[str] | None = None) -> StateDict:
    """Find the tensors of a network in what a file holds.

    Of several sets of one network, averaged weights give way to others; those that are left must be equal.

    Args:
        content: mappings and values, as `read_torch_file` returns them.
        path: of the file, for messages.
        names: of the network's tensors, where it is known: decides between several sets of tensors, and lets
            plain values beside the tensors pass.

    Raises:
        InputError: there are no tensors by name, or several sets of them (all are listed), or other things
            among them.
    """
    found = list(_candidates(content))
    if not found:
        raise InputError(f"{path}: expected tensors by name (got {_what(content)})")
    place, tensors = _choose(found, content, path, names)
    where = (f"taken from {'.'.join(place)!r}",) if place not in ((), _OF_ONE_PROGRAM) else ()
    others = [".".join(other) for other, _ in found if other[: len(place)] != place]
    left = (f"left alone: {listed(others)}",) if others else ()
    only = _tensors_of(tensors)
    if names is None and len(only) < len(tensors):
        other = listed(key for key in tensors if key not in only)
        raise InputError(f"{path}: expected tensors by name (got something else under {other})")
    _check_dense(only, path)
    plain = without_wrappers({name: tensor.detach() for name, tensor in only.items()}, names, path)
    return StateDict(plain.tensors, (*where, *plain.notes, *left))


def without_wrappers(
    tensors: Mapping[str, Tensor], names: Collection[str] | None = None, path: Path | str = "tensors"
) -> StateDict:
    """Take the names of wrappers off, whatever their order.

    Without `names`, only what no network is called: `module.` in front of all names, in any depth, the parts
    that compilers and shards put in, and the counter beside averaged weights. With `names`, `module` at any
    place unless some of them have it, and any prefix behind which all of them lie; tensors without that
    prefix, such as a loss's, are left out. Of several such prefixes, those of averaged weights give way to
    others; the tensors behind those that are left must be equal.

    Args:
        tensors: by the names in the file.
        names: of the network's tensors, each at least once.
        path: of the file, for messages.

    Raises:
        InputError: there are other tensors of the same names behind another prefix; the prefixes are listed.
    """
    plain, sets = _unwrapped(tensors, names)
    _check_one(list(sets.items()), path, "no prefix")
    return plain


def _unwrapped(
    tensors: Mapping[str, Tensor], names: Collection[str] | None
) -> tuple[StateDict, dict[str, dict[str, Tensor]]]:
    """Return tensors without wrappers, and those of the names behind each prefix that they may have."""
    wrappers = _PARTS if names is None else (*_PARTS, _AMBIGUOUS_PART)
    parts = [part for part in wrappers if not any(part in name.split(".") for name in names or ())]
    names = None if names is None else set(names)
    renamed = {_without_parts(name, parts): tensor for name, tensor in tensors.items()}
    taken = [f"{part}." for part in parts if any(part in name.split(".") for name in tensors)]
    if len(renamed) < len(tensors):  # two names became one: these parts tell tensors apart
        renamed, taken = dict(tensors), []
    prefixes = [_front_of(renamed)] if names is None else prefixes_of(renamed, names)
    prefix = prefixes[0]
    kept = {n.removeprefix(prefix): t for n, t in renamed.items() if n.startswith(prefix)}
    left = [name for name in renamed if not name.startswith(prefix)]
    if names is not None and taken and not prefix:  # what lay beside the wrapper, such as a loss
        left = [name for name in renamed if name in tensors and name not in names]
        left = left if all(name not in tensors for name in renamed if name in names) else []
        kept = {name: tensor for name, tensor in kept.items() if name not in left}
    notes = [f"{listed(map(repr, [*taken, *([prefix] if prefix else [])]))} taken off the names"]
    notes = (notes if taken or prefix else []) + ([f"left out: {listed(left)}"] if left else [])
    sets = {p: {n: renamed[p + n] for n in names or () if p + n in renamed} for p in prefixes}
    return StateDict(kept, tuple(notes)), sets


def names_among(found: Collection[str], wanted: Collection[str]) -> dict[str, str]:
    """Map each name to the one of `wanted` that differs from it in wrappers around parts alone, or to itself.

    Where two names would become one, all stay.
    """
    parts = (*_PARTS, _AMBIGUOUS_PART)
    meant = {_without_parts(name, parts): name for name in wanted}
    known = set(wanted)
    names = {name: name if name in known else meant.get(_without_parts(name, parts), name) for name in found}
    apart = len(meant) == len(known) and len(set(names.values())) == len(names)
    return names if apart else {name: name for name in found}


def _candidates(content: Any, place: Place = ()) -> Iterator[tuple[Place, Values]]:
    """Yield mappings that hold tensors by name, each with the keys that lead to it, outer ones first."""
    if not isinstance(content, Mapping) or len(place) > _MOST_LEVELS:
        return
    if any(tensor.ndim > 0 for tensor in _tensors_of(content).values()):
        yield place, content
    for key, value in content.items():
        if isinstance(key, str) and not key.startswith(_NO_WEIGHTS):
            yield from _candidates(value, (*place, key))


def _tensors_of(values: Values) -> dict[str, Tensor]:
    return {key: value for key, value in values.items() if isinstance(key, str) and isinstance(value, Tensor)}


def _choose(
    found: list[tuple[Place, Values]], content: Any, path: Path, names: Collection[str] | None
) -> tuple[Place, Values]:
    """Return the set that fits the names, else the usual one; no other of its names may differ from it."""
    sets = {place: _named(values, names) for place, values in found}
    usual = _usual_place(content)
    chosen = [place for place in sets if names is not None and sets[place].keys() >= set(names)]
    if not chosen and usual in sets:
        chosen = [place for place in sets if sets[place].keys() == sets[usual].keys()]
    if not chosen and len(sets) > 1:
        raise _several(path, map(".".join, sets), "the file itself")
    labels = {place: ".".join(place) for place in chosen or sets}
    wanted = _preferred(labels.values())
    places = [place for place, label in labels.items() if label in wanted]
    if len(places) > 1:
        for place in places:
            _check_dense(sets[place], path)
        _check_one([(labels[place], sets[place]) for place in places], path, "the file itself")
    place = usual if usual in places else places[0]
    return place, dict(found)[place]


def _named(values: Values, names: Collection[str] | None) -> dict[str, Tensor]:
    """Return tensors of a record by names without wrappers, of known names only these."""
    plain, _ = _unwrapped(_tensors_of(values), names)
    return {name: tensor for name, tensor in plain.tensors.items() if names is None or name in names}


def _preferred(labels: Iterable[str]) -> list[str]:
    """Leave averaged weights out where there are others; one that goes on changing beside them is none."""
    labels = list(labels)
    averaged = [label for label in labels if _AVERAGED.search(label)]
    others = [label for label in labels if label not in averaged]
    if averaged:
        others = [label for label in others if not _BESIDE_AVERAGED.search(label)]
    return others or averaged


def _check_one(sets: Sequence[tuple[str, Mapping[str, Tensor]]], path: Path | str, nowhere: str) -> None:
    """Refuse sets of tensors, by where they lie, that are not all the same."""
    (_, first), *others = sets
    for _, other in others:
        if first.keys() != other.keys() or not all(
            tensor.dtype == other[name].dtype and torch.equal(tensor, other[name])
            for name, tensor in first.items()
        ):
            raise _several(path, (label for label, _ in sets), nowhere)


def _several(path: Path | str, labels: Iterable[str], nowhere: str) -> InputError:
    places = listed(label or nowhere for label in labels)
    return InputError(f"{path}: expected the tensors of one network (got several sets: {places})")


def _usual_place(content: Any) -> tuple[str, ...]:
    """Follow the usual keys as long as there are some."""
    place: tuple[str, ...] = ()
    while isinstance(content, Mapping) and len(place) < _MOST_LEVELS:
        key = next((k for k in _NESTINGS if isinstance(content.get(k), Mapping) and content[k]), None)
        if key is None:
            break
        place, content = (*place, key), content[key]
    return place


def _check_dense(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that are not plain arrays of a network, or are more than there is memory."""
    if flat := [name for name in tensors if name.rpartition(".")[2] == "_flat_param"]:
        raise InputError(
            f"{path}: expected tensors by the names of a network (got flattened shards of FSDP: "
            f"{listed(flat)}); save its full state_dict"
        )
    if odd := [
        f"{name} ({'quantised' if tensor.is_quantized else tensor.layout})"
        for name, tensor in tensors.items()
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta
    ]:
        raise InputError(f"{path}: expected dense tensors (got others: {listed(odd)})")
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    check_memory(needed, f"{path}: {len(tensors)} tensors")


def _front_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the names of wrappers in front of all tensors but counters and the network beside averages."""
    own = [name for name, tensor in tensors.items() if tensor.ndim and not name.startswith("online_model.")]
    fronts = [found[0] for name in own if (found := _FRONTS.match(name))]
    return commonprefix(fronts)  # noqa: RUF071 - of words that all begin differently


def prefixes_of(found: Iterable[str], names: Collection[str]) -> list[str]:
    """Return the prefixes of found names behind which most of a network's lie, empty where there is none.

    Those of averaged weights are returned only where there is nothing else.
    """
    counts = Counter(
        ".".join([*parts[:cut], ""]) if cut else ""
        for parts in (name.split(".") for name in found)
        for cut in range(len(parts))
        if ".".join(parts[cut:]) in names
    )
    most = max(counts.values(), default=0)
    best = [prefix for prefix, count in counts.items() if count == most]
    return sorted(_preferred(best), key=lambda prefix: not prefix) or [""]


def _without_parts(name: str, parts: Collection[str]) -> str:
    return ".".join(part for part in name.split(".") if part not in parts)


def _what(content: Any) -> str:
    if not isinstance(content, Mapping):
        return type(content).__name__
    keys = listed(shown(repr(key), 40) for key in content)
    return f"{type(content).__name__} with {keys}" if content else type(content).__name__
