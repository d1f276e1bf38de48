"""Data sets described by a `dataset.json`: nnU-Net's raw format, and the Medical Segmentation Decathlon's.

nnU-Net keeps one file per channel, `CASE_0000`, `CASE_0001`, …; a Decathlon archive lists its files and keeps
all channels of a case in one file with four axes.
"""

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm_ext.data.formats.entries import Entry, Image, Listing, named_after, numbers_in
from timm_ext.data.volume import SUFFIXES
from timm_ext.documents import read_json
from timm_ext.errors import InputError
from timm_ext.files import real_path, visible

HEADER_NAME = "dataset.json"
_IGNORE = "ignore"
_NUMBER = re.compile(r"[0-9]{1,5}")
_LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Header:
    """The content of a `dataset.json`.

    Attributes:
        path: the file.
        name: of the data set.
        channels: number and name of each input channel, in order.
        ending: of the files' names.
        labels: numbers by name, the background's included; several numbers make a region. In the order of
            nnU-Net's outputs (`LabelManager`, nnunetv2 2.8): ascending numbers, regions as they are written.
        order: the number as which nnU-Net writes each region, where it is stated.
        training: listed pairs of image and label, relative to the file's folder.
        test: listed images.
        cases: images and label by case, where nnU-Net's `dataset` states them.
    """

    path: Path
    name: str
    channels: tuple[tuple[int, str], ...]
    ending: str
    labels: Mapping[str, tuple[int, ...]]
    order: tuple[int, ...] | None
    training: tuple[tuple[str, str], ...]
    test: tuple[str, ...]
    cases: Mapping[str, tuple[tuple[str, ...], str]]

    @property
    def root(self) -> Path:
        """Folder of the data set."""
        return self.path.parent


def is_header(value: Any) -> bool:
    """Whether a JSON value is the content of a `dataset.json`."""
    return (
        isinstance(value, dict) and "labels" in value and bool({"channel_names", "modality"} & value.keys())
    )


def read_header(path: Path) -> Header:
    """Read a `dataset.json`.

    Raises:
        InputError: it cannot be read, or names no channels, or a part of it is of another kind.
    """
    return parse_header(read_json(path), path)


def parse_header(value: Any, path: Path) -> Header:
    """Check the content of a `dataset.json`; errors are those of `read_header`."""
    content = value if isinstance(value, dict) else {}
    ending = content.get("file_ending", ".nii.gz")
    if ending not in SUFFIXES:
        raise InputError(f"{path}: expected a file_ending out of {', '.join(SUFFIXES)} (got {ending!r})")
    name = content.get("name")
    return Header(
        path=path,
        name=name if isinstance(name, str) and name.strip() else real_path(path).parent.name,
        channels=_channels(content, path),
        ending=ending,
        labels=_labels(content.get("labels", {}), path),
        order=_order(content.get("regions_class_order"), path),
        training=tuple(_listed_pairs(content.get("training"))),
        test=tuple(_listed_images(content.get("test"))),
        cases=_stated_cases(content.get("dataset"), path),
    )


def nnunet(header: Header, folder: Path, *, labelled: bool) -> Listing:
    """Find the cases whose images lie in a folder of a data set with a `dataset.json`.

    Raises:
        InputError: there is no such folder.
    """
    names = header.labels
    if labelled and header.cases:
        entries = list(_stated(header))
    elif not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    else:
        entries = _found(header, folder, labelled)
    return Listing(tuple(entries), numbers_in(names), names, header.path)


def numbered_cases(header: Header | None, folder: Path) -> list[str]:
    """Return the ids of the cases whose channels lie in a folder as nnU-Net names them, `CASE_0000`.

    Args:
        header: says how the names end; without it all endings do.
        folder: of the images.
    """
    endings = SUFFIXES if header is None else (header.ending,)
    pattern = re.compile(rf"(.+)_\d{{4}}({'|'.join(map(re.escape, endings))})", re.ASCII)
    return sorted({match[1] for file in visible(folder) if (match := pattern.fullmatch(file.name))})


def refuse_unnamed_channels(header: Header, folder: Path) -> None:
    """Refuse files of channels that a header does not name: they would be left out in silence.

    Args:
        header: of the data set that a network was trained on.
        folder: of images `CASE_0000`, `CASE_0001`, … that the network is to see.

    Raises:
        InputError: there is such a file.
    """
    named = [f"{number:04d} {name}" for number, name in header.channels]
    pattern = re.compile(rf".+_(\d{{4}}){re.escape(header.ending)}", re.ASCII)
    for file in visible(folder):
        match = pattern.fullmatch(file.name)
        if match and int(match[1]) not in dict(header.channels):
            raise InputError(
                f"{file}: expected images of the network's channels alone, {', '.join(named)} (got channel "
                f"{match[1]}; a {HEADER_NAME} in the folder or beside it says which channel is which)"
            )


def task_of(header: Header) -> dict[str, Any]:
    """Describe the task of a data set as `task_from_dict` reads it.

    The channels are the modalities, the labels besides the background the regions: classes of a softmax, as
    nnU-Net has them, unless one of them is of several numbers; then each is predicted by itself.

    Raises:
        InputError: there is no label besides the background, or an `ignore` label, which has no region.
    """
    regions = {name: list(numbers) for name, numbers in header.labels.items() if numbers != (0,)}
    if not regions:
        raise InputError(f"{header.path}: expected a label besides the background (got none)")
    if ignored := [name for name in regions if name.lower() == _IGNORE]:
        raise InputError(
            f"{header.path}: a task cannot leave out voxels, expected no label {ignored[0]!r}; give the "
            "label a region in a task file of your own"
        )
    if header.order is not None and len(header.order) != len(regions):
        raise InputError(
            f"{header.path}: regions_class_order: expected a number for each of {len(regions)} regions "
            f"(got {list(header.order)})"
        )
    overlapping = any(len(numbers) > 1 for numbers in regions.values())
    labels = {number for numbers in regions.values() for number in numbers} | {0}
    return {
        "name": header.name,
        "modalities": [name for _, name in header.channels],
        "regions": regions,
        "labels": sorted(labels),
        "softmax": not overlapping,
        "class_order": list(header.order or ()) if overlapping else [],
    }


def _channels(content: Mapping[str, Any], path: Path) -> tuple[tuple[int, str], ...]:
    channels = content.get("channel_names", content.get("modality"))
    pairs = channels.items() if isinstance(channels, dict) else ()
    fits = [_NUMBER.fullmatch(str(key)) and isinstance(name, str) and name.strip() for key, name in pairs]
    if not fits or not all(fits):
        raise InputError(f'{path}: expected channel_names such as {{"0": "T1"}} (got {channels!r})')
    numbered = sorted((int(key), name.strip()) for key, name in channels.items())
    if len({number for number, _ in numbered}) < len(numbered):
        raise InputError(f"{path}: expected each channel once (got {channels!r})")
    return tuple(numbered)


def _labels(value: Any, path: Path) -> dict[str, tuple[int, ...]]:
    """Return numbers by name from nnU-Net's `{name: number or list}` or the Decathlon's `{"1": name}`."""
    pairs: list[tuple[str, Any]] = list(value.items()) if isinstance(value, dict) else [("", None)]
    if pairs and all(_NUMBER.fullmatch(key) and isinstance(name, str) for key, name in pairs):
        pairs = [(name, int(key)) for key, name in pairs]
    labels: dict[str, tuple[int, ...]] = {}
    for name, given in pairs:
        numbers = given if isinstance(given, list) and given else [given]
        if not all(type(number) is int and 0 <= number <= _LARGEST for number in numbers):
            raise InputError(
                f'{path}: labels: expected numbers by name such as {{"liver": 1}} (got {value!r})'
            )
        labels[name.strip()] = tuple(dict.fromkeys((*labels.get(name.strip(), ()), *numbers)))
    if any(len(numbers) > 1 for numbers in labels.values()):
        return labels
    return dict(sorted(labels.items(), key=lambda pair: pair[1]))


def _order(value: Any, path: Path) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(number) is int for number in value):
        raise InputError(f"{path}: regions_class_order: expected a list of numbers (got {value!r})")
    return tuple(value)


def _listed_pairs(value: Any) -> Iterator[tuple[str, str]]:
    for item in value if isinstance(value, list) else ():
        match item:
            case {"image": str(image), "label": str(label)}:
                yield image, label


def _listed_images(value: Any) -> Iterator[str]:
    for item in value if isinstance(value, list) else ():
        match item:
            case str(image) | {"image": str(image)}:
                yield image


def _stated_cases(value: Any, path: Path) -> dict[str, tuple[tuple[str, ...], str]]:
    cases: dict[str, tuple[tuple[str, ...], str]] = {}
    for name, case in (value if isinstance(value, dict) else {}).items():
        match case:
            case {"images": [*images], "label": str(label)} if all(isinstance(i, str) for i in images):
                cases[name] = tuple(images), label
            case _:
                raise InputError(f"{path}: dataset: expected images and a label of {name!r} (got {case!r})")
    return cases


def _stated(header: Header) -> Iterator[Entry]:
    names = [name for _, name in header.channels]
    for case, (images, label) in header.cases.items():
        if len(images) != len(names):
            raise InputError(
                f"{header.path}: dataset: expected {len(names)} images of {case!r}, "
                f"{', '.join(names)} (got {len(images)})"
            )
        files = [header.root / os.path.expandvars(image) for image in images]
        pairs = tuple(Image(name, file) for name, file in zip(names, files, strict=True))
        yield Entry(case, pairs, (header.root / os.path.expandvars(label),))


def _found(header: Header, folder: Path, labelled: bool) -> list[Entry]:
    listed = _listed_in(header, folder, labelled)
    files = sorted(file.name for file in visible(folder, "*") if file.name.endswith(header.ending))
    if not listed:
        numbered = numbered_cases(header, folder)
        if numbered or not files:
            there = set(visible(header.root / "labelsTr")) if labelled else None
            return [_numbered(header, folder, name, there) for name in numbered]
        listed = {folder / name: header.root / "labelsTr" / name for name in files}
    return [_whole(header, image, label if labelled else None) for image, label in listed.items()]


def _listed_in(header: Header, folder: Path, labelled: bool) -> dict[Path, Path]:
    """Return the listed images of a folder and their labels, or nothing where the list does not hold.

    nnU-Net's first version lists `CASE.nii.gz` for files that are called `CASE_0000.nii.gz`.
    """
    pairs: Sequence[tuple[str, str]] = header.training if labelled else [(name, name) for name in header.test]
    listed = {header.root / image: header.root / label for image, label in pairs}
    shown = {image: label for image, label in listed.items() if not image.name.startswith(".")}
    inside = {image: label for image, label in shown.items() if labelled or image.parent == folder}
    return inside if any(image.is_file() for image in inside) else {}


def _numbered(header: Header, folder: Path, case: str, there: Collection[Path] | None) -> Entry:
    """A file for each channel, and a label map among those that are there; None where none is meant."""
    images = tuple(
        Image(name, folder / f"{case}_{number:04d}{header.ending}") for number, name in header.channels
    )
    if there is None:
        return Entry(case, images)
    label = header.root / "labelsTr" / f"{case}{header.ending}"
    return Entry(case, images, (label,), others=() if label in there else named_after(case, there))


def _whole(header: Header, image: Path, label: Path | None) -> Entry:
    """One file per case; where there are several channels, they are its fourth axis."""
    several = len(header.channels) > 1
    images = tuple(
        Image(name, image, place if several else None) for place, (_, name) in enumerate(header.channels)
    )
    suffix = next((suffix for suffix in (".nii.gz", *SUFFIXES) if image.name.endswith(suffix)), "")
    return Entry(image.name.removesuffix(suffix), images, () if label is None else (label,))
