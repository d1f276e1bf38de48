"""The names of regions: one form for all spellings of a name, and what the known names mean.

Known are the tissues of a brain tumour and the fourteen structures of the parcellation.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from timm_ext.errors import InputError
from timm_ext.vocabulary.structures import STRUCTURES

Meaning = frozenset[tuple[str, str]]
"""Pairs of a structure and a side; a name without a side means both."""

_SIDES = ("left", "right")
_WORDS = {
    "lh": "left", "rh": "right", "l": "left", "r": "right", "grey": "gray", "gm": "gray matter",
    "wm": "white matter", "cerebellar": "cerebellum", "cerebrum": "cerebral",
    "ncr": "necrosis", "necrotic": "necrosis", "nekrose": "necrosis", "nekrotisch": "necrosis",
    "necrose": "necrosis", "net": "non enhancing", "netc": "non enhancing", "nonenhancing": "non enhancing",
    "nonenhanced": "non enhancing", "unenhanced": "non enhancing", "nicht": "non",
    "ed": "edema", "edematous": "edema", "snfh": "edema", "flair": "edema", "odem": "edema",
    "odema": "edema", "oedem": "edema", "oedeme": "edema", "odeme": "edema", "edeme": "edema",
    "ce": "enhancing", "et": "enhancing", "enhanced": "enhancing", "enhancement": "enhancing",
    "anreichernd": "enhancing", "kontrastanreichernd": "enhancing",
    "wt": "whole tumor", "tc": "tumor core", "rc": "cavity", "complete": "whole", "entire": "whole",
}  # fmt: skip
_JOINTS = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z]{2})|(?<=[A-Za-z]{2})(?=[0-9])")
_CORE, _EDEMA, _ENHANCING, _CAVITY = "necrotic core", "oedema", "enhancing tumour", "resection cavity"


def form_of(name: str) -> str:
    """Return the words of a name in one spelling and order: `KidneyLeft` and `left kidneys` have one form."""
    return " ".join(sorted(words_of(name)))


def words_of(name: str) -> list[str]:
    """Return the words of a name, each in one spelling, without accents and the s of a plural."""
    text = _JOINTS.sub(" ", _without_accents(name)).lower()
    text = text.replace("oedema", "edema").replace("tumour", "tumor").replace("haem", "hem")
    text = re.sub(r"non[\W_]*(contrast[\W_]*)?enhanc", "non enhanc", text)
    words = (re.sub(r"(?<=\w\w[^\Wsui])s$", "", word) for word in re.findall(r"[^\W_]+", text))
    return " ".join(_WORDS.get(word, word) for word in words).split()


def meaning_of(name: str, *, parts: bool = True) -> Meaning:
    """Return the structures that a name means; empty where nobody knows it.

    The enhancing tumour, for example, is also ET, contrast-enhancing tumor, AT; oedema is also edema, ED,
    SNFH (surrounding non-enhancing FLAIR hyperintensity).

    Args:
        name: in any spelling.
        parts: whether a part of a structure, such as the third ventricle, means that structure.
    """
    words = words_of(name)
    sides = [side for side in _SIDES if side in words]
    rest = [word for word in words if word not in _SIDES]
    structure = _KNOWN.get(form := " ".join(sorted(rest))) or (_WHOLES.get(form) if parts else None)
    found = _tissues(rest) or ({structure} if structure else set())
    return frozenset((structure, side) for structure in found for side in sides or _SIDES)


def matching(source: Sequence[str], target: Sequence[str]) -> tuple[int | None, ...]:
    """Return, for each region of the target, the place of the same region in the source; None where none is.

    Regions are the same whose names have one form, else whose names alone in both have one meaning.

    Raises:
        InputError: two regions of one of them have names of one form.
    """
    for names in (source, target):
        _check_forms(names)
    forms = {form_of(name): place for place, name in enumerate(source)}
    meanings, wanted = _single_meanings(source), _single_meanings(target)
    places = [forms.get(form_of(name)) for name in target]
    for meaning, place in wanted.items():
        if places[place] is None and meanings.get(meaning) not in places:
            places[place] = meanings.get(meaning)
    return tuple(places)


def _check_forms(names: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        if (other := seen.setdefault(form_of(name), name)) is not name:
            raise InputError(f"regions: expected names that differ in their words (got {other} and {name})")


def _single_meanings(names: Sequence[str]) -> dict[Meaning, int]:
    """Return the places of known names, but not of those that share a meaning."""
    meanings = [meaning_of(name, parts=False) for name in names]
    counts = Counter(meanings)
    return {one: place for place, one in enumerate(meanings) if one and counts[one] == 1}


def _tissues(words: list[str]) -> set[str]:
    """Return the tissues of a brain tumour that some words name."""
    text = " ".join(words)
    if {"whole", "tumor"} <= set(words):
        return {_CORE, _EDEMA, _ENHANCING}
    if text in ("at", "active tumor"):
        return {_ENHANCING}
    found = {_EDEMA} if "edema" in words else set()
    found |= {_CAVITY} if "cavity" in words else set()
    spared = re.sub(r"\bnon (contrast )?enhancing\b", "spared", text).split()
    found |= {_ENHANCING} if "enhancing" in spared else set()
    found |= {_CORE} if "necrosis" in words or ("spared" in spared and _EDEMA not in found) else set()
    core = {"tumor", "core"} <= set(words) or words == ["core"]
    return found or ({_CORE, _ENHANCING} if core else set())


def _without_accents(name: str) -> str:
    letters = unicodedata.normalize("NFKD", name.replace("œ", "oe").replace("Œ", "Oe"))
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


_KNOWN = {
    form_of(name): structure.name
    for structure in STRUCTURES.values()
    for name in (structure.name, *structure.synonyms)
}
_WHOLES = {form_of(part): structure.name for structure in STRUCTURES.values() for part in structure.parts}
