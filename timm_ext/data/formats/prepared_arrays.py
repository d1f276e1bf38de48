"""Data sets as nnU-Net has preprocessed them: a folder of arrays beside the `dataset.json`.

A case is `CASE.b2nd` and `CASE_seg.b2nd`; of versions before 2.6 `CASE.npz`, which nnU-Net unpacks into
`CASE.npy` and `CASE_seg.npy`. `CASE.pkl` is not read.
"""

from pathlib import Path

from timm_ext.data.formats.dataset_json import Header
from timm_ext.data.formats.entries import Entry, Image, Listing, numbers_in
from timm_ext.files import visible

ENDINGS = (".b2nd", ".npy", ".npz")
_LABELS = "_seg"


def is_prepared(file: Path) -> bool:
    """Tell whether a file is of arrays that nnU-Net has preprocessed."""
    return file.suffix in ENDINGS


def holds_prepared(folder: Path) -> bool:
    """Tell whether a folder holds cases that nnU-Net has preprocessed."""
    return any(is_prepared(file) for file in visible(folder))


def prepared_arrays(header: Header, folder: Path) -> Listing:
    """Find the preprocessed cases of a data set; the channels of each are axis 0 of one array."""
    names = [file.name for file in visible(folder) if is_prepared(file)]
    stems = {name.rpartition(".")[0] for name in names}
    cases = sorted(stem for stem in stems if not stem.endswith(_LABELS))
    entries = tuple(_entry(header, folder, case, set(names)) for case in cases)
    return Listing(entries, numbers_in(header.labels), header.labels, header.path)


def _entry(header: Header, folder: Path, case: str, names: set[str]) -> Entry:
    ending = next(ending for ending in ENDINGS if f"{case}{ending}" in names)
    label = f"{case}{ending}" if ending == ".npz" else f"{case}{_LABELS}{ending}"
    images = tuple(
        Image(name, folder / f"{case}{ending}", place) for place, (_, name) in enumerate(header.channels)
    )
    return Entry(case, images, (folder / label,) if label in names else ())
