"""BraTS releases: folders of files that are named `ID_KIND.nii.gz`."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from timm_ext.data.formats.entries import Entry, Image, Listing, named_after
from timm_ext.files import visible
from timm_ext.vocabulary.modalities import BRATS_MODALITIES, modality_key

_ENDING = re.compile(r"\.nii(?:\.gz)?", re.IGNORECASE)
_OTHER_LABELS = {"label", "labels"}
_LABELS = {"seg", *_OTHER_LABELS}
_KINDS = {*_LABELS, *map(modality_key, BRATS_MODALITIES)}
_KINDS_OF_2023 = {"t1n", "t2f"}


def brats(folder: Path) -> Listing:
    """Find the cases of a BraTS release, at any depth below a folder.

    Label files may also be called `ID_label` or `ID_labels`, where a case has images, no `ID_seg` and one of
    these. Releases from 2023 on (`ID-t1n`, `ID-t2f`) number the enhancing tumour 3.
    """
    groups: dict[tuple[Path, str], dict[str, list[Path]]] = {}
    unknown: dict[Path, list[Path]] = {}
    recent = False
    for file in sorted(visible(folder, "*.nii*", deep=True)):
        if (parts := _parts(file.name)) is None:
            unknown.setdefault(file.parent, []).append(file)
            continue
        name, kind = parts
        recent |= kind.lower() in _KINDS_OF_2023
        groups.setdefault((file.parent, name), {}).setdefault(kind, []).append(file)
    for (place, _), files in groups.items():
        for kind in _no_labels(files):
            unknown.setdefault(place, []).extend(files.pop(kind))
    entries = []
    for (place, name), files in groups.items():
        labels = tuple(file for kind, found in files.items() if kind.lower() in _LABELS for file in found)
        images = [Image(kind, file) for kind, found in files.items() for file in found if file not in labels]
        if files:
            others = named_after(name, unknown.get(place, ()))
            entries.append(Entry(name, tuple(images), labels, others=others))
    return Listing(tuple(entries), (1, 2, 3) if recent else (), source=folder)


def _no_labels(files: Mapping[str, Sequence[Path]]) -> list[str]:
    """Return the kinds of a case's files that could be labels by their name, but are not taken for them."""
    kinds = {kind: kind.lower() for kind in files}
    other = [kind for kind, word in kinds.items() if word in _OTHER_LABELS]
    has_images = not {*kinds.values()} <= _LABELS
    single = sum(len(files[kind]) for kind in other) == 1
    return [] if has_images and single and "seg" not in kinds.values() else other


def _parts(file_name: str) -> tuple[str, str] | None:
    """Divide `ID_KIND.nii.gz` into id and kind; that may have two words, as in `ID_T2-FLAIR` and `ID_T1-Gd`.

    The first of two must be the contrast: in `ID_post_T1` the word before belongs to the id.
    """
    match = _ENDING.search(file_name)
    if match is None or match.end() != len(file_name):
        return None
    places = [found.start() for found in re.finditer(r"[_-]", file_name[: match.start()])]
    for place in places[-2:]:
        name, kind = file_name[:place], file_name[place + 1 : match.start()]
        begins = re.match(r"t[12]|[a-z0-9]+$", kind, re.IGNORECASE)
        if name and begins and modality_key(kind) in _KINDS:
            return name, kind
    return None
