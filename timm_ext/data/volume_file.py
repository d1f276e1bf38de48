"""Files of volumes: NIfTI and FreeSurfer, decompressed once and checked to their last byte.

A damaged file must not become a wrong volume: the checksum and the length of gzip are compared at the end of
the stream, and a file holds just the voxels that its header counts.
"""

import gzip
import logging
import struct
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from nibabel.arrayproxy import ArrayProxy
from nibabel.freesurfer.mghformat import MGHHeader
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header

from timm_ext.errors import InputError
from timm_ext.files import ending_of, stem_of, visible
from timm_ext.system.machine import check_memory
from timm_ext.system.terminal import say

Array = npt.NDArray[Any]
Affine = npt.NDArray[np.float64]

SUFFIXES = (".nii", ".nii.gz", ".mgz", ".mgh")
PROBABILITIES = "_probabilities"
"""What the name of a case's probabilities has behind the name of its label map."""

_COMPRESSED = (".nii.gz", ".mgz")
_NIFTI = (".nii", ".nii.gz")
_PAIRS = (".hdr", ".img", ".hdr.gz", ".img.gz")
_GZIP_MAGIC = b"\x1f\x8b"
_GZIP_RATIO = 1032  # deflate codes at most 258 bytes in two bits
_MGH_BYTES, _NIFTI_BYTES, _NIFTI2_BYTES = 284, 348, 540
_CHUNK = 1 << 20
_BLOCK = 512  # files may be filled up with zeros to whole blocks
_MOST_FOOTER = 64 << 20  # bytes of tags behind the voxels of an MGH file
_LAST_TAG = 1000  # far beyond those in use
_MILLIMETRES = {1: 1e3, 3: 1e-3}  # of NIfTI's codes for metre and micrometre
_SMALLEST_VOXEL_MM, _LARGEST_FIELD_MM, _FARTHEST_MM = 1e-6, 1e5, 1e7

_TOLD = threading.Event()

# Its checks would tell on standard error what our one line tells.
_SILENT = logging.getLogger(f"{__name__}.nibabel")
_SILENT.addHandler(logging.NullHandler())
_SILENT.propagate = False


@dataclass(frozen=True, eq=False)
class Header:
    """What a file says of its voxels.

    Attributes:
        shape: lengths of the axes; those of length 1 behind the third are dropped.
        affine: `[4, 4]` float64 from voxel indices to RAS millimetres: of a NIfTI file its sform where that
            has a code, else its qform, else one from the voxel sizes alone.
        forms: of a NIfTI file sform and qform, as far as they have a code, by name; else empty.
        dtype: of the stored numbers.
        offset: where they begin, in bytes.
        slope: a voxel's value is slope · stored + intercept.
        intercept: see `slope`.
        header: as nibabel has it.
    """

    shape: tuple[int, ...]
    affine: Affine
    forms: dict[str, Affine]
    dtype: np.dtype[Any]
    offset: int
    slope: float
    intercept: float
    header: Any

    @property
    def scaled(self) -> bool:
        """Whether values differ from the stored numbers."""
        return (self.slope, self.intercept) != (1.0, 0.0)


def volume_files(folder: Path | str) -> dict[str, Path]:
    """List the volumes of a folder by their names without the ending; hidden files are left out.

    Raises:
        InputError: there is no such folder, or two files have one name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder of label maps (got no such folder)")
    found: dict[str, Path] = {}
    for path in sorted(visible(folder)):
        if ending_of(path) not in SUFFIXES:
            continue
        name = stem_of(path)
        if name in found:
            raise InputError(
                f"{folder}: expected one label map per name (got {found[name].name}, {path.name})"
            )
        found[name] = path
    return found


def read_header(path: Path | str) -> Header:
    """Read what a file says of its voxels, without them.

    Raises:
        InputError: the file is missing, of another kind or damaged, or its place in space makes no sense.
    """
    with _opened(Path(path)) as stream:
        return _parsed(stream, Path(path))


def read_stored(path: Path | str, channels: Sequence[int | None] = (None,)) -> tuple[list[Array], Header]:
    """Read a file's header and the values of its voxels, and check the file to its end.

    Args:
        path: the file.
        channels: which volumes to take of a file with four axes, from 0; None for a file with three. Of each
            come its values `[D, H, W]`, scaled ones in float32 or float64, others as they are stored.

    Raises:
        InputError: as `read_header`; the file is cut, altered, longer than its header says, or does not fit
            in memory; or it is not three-dimensional, or has no such volume.
    """
    path = Path(path)
    with _opened(path) as stream:
        header = _parsed(stream, path)
        for channel in channels:
            _check_axes(header.shape, channel, path)
        _check_size(header, path)
        spec = (header.shape, header.dtype, header.offset, header.slope, header.intercept)
        with np.errstate(all="ignore"):  # what is beyond the type's range becomes infinite, refused later
            values: Array = np.asanyarray(ArrayProxy(stream, spec, mmap=False))
        _check_end(stream, isinstance(header.header, MGHHeader))
    if len(values.shape) == 3:
        return [values for _ in channels], header
    return [values[..., channel].copy(order="K") for channel in channels], header


def _unreadable(path: Path, reason: object) -> InputError:
    told = " ".join(str(reason).split()) or type(reason).__name__
    told = f"unknown code {told}" if isinstance(reason, KeyError) else told
    return InputError(f"{path}: cannot be read, the file is truncated or corrupt ({told})")


class _Stream(gzip.GzipFile):
    """A gzip stream that fills the memory it is given piece by piece; Python's own holds all of it twice."""

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as the stream goes; return the number of bytes."""
        place, filled = memoryview(buffer).cast("B"), 0
        while block := self.read(min(_CHUNK, len(place) - filled)):
            place[filled : filled + len(block)] = block
            filled += len(block)
        return filled


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file for one pass over its content, decompressed if need be; damage is an `InputError`."""
    if ending_of(path) in _PAIRS or path.name.endswith(_PAIRS):
        raise InputError(
            f"{path}: expected header and voxels in one file (got one of a pair); convert it to .nii"
        )
    if ending_of(path) not in SUFFIXES:
        raise InputError(f"{path}: expected a file that ends in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            _check_compression(file.read(2), path)
            file.seek(0)
            if ending_of(path) not in _COMPRESSED:
                yield file
                return
            with _Stream(fileobj=file, mode="rb") as stream:
                yield stream  # type: ignore[misc]  # a binary stream in all that is used of it
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(f"{path}: expected to fit in memory (got no memory for it)") from error
    except gzip.BadGzipFile as error:
        behind = "Not a gzipped file" in str(error)  # the first member was found
        raise _unreadable(path, "something else follows the gzip stream" if behind else error) from error
    except Exception as error:  # on damaged bytes nibabel, numpy and zlib raise whatever they trip over
        raise _unreadable(path, error) from error


def _check_compression(start: bytes, path: Path) -> None:
    compressed, ending = start == _GZIP_MAGIC, ending_of(path)
    if not start:
        raise _unreadable(path, "it is empty")
    if compressed != (ending in _COMPRESSED):
        expected, got = ("a", "another content") if not compressed else ("no", "one")
        raise InputError(
            f"{path}: cannot be read, expected {expected} gzip stream in a file named {ending} (got {got})"
        )


def _parsed(stream: BinaryIO, path: Path) -> Header:
    block = stream.read(_NIFTI_BYTES if ending_of(path) in _NIFTI else _MGH_BYTES)
    kind = _kind_of(block, path)
    if kind is Nifti2Header:
        block += stream.read(_NIFTI2_BYTES - _NIFTI_BYTES)
    header = kind(block[: kind.template_dtype.itemsize], check=False)
    header.check_fix(logger=_SILENT, error_level=40)
    if kind is not MGHHeader:
        _to_millimetres(header)
        if not (header["sform_code"] or header["qform_code"]):
            _tell_of_no_form(path)
    shape = tuple(int(length) for length in header.get_data_shape())
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    slope, intercept = header.get_slope_inter()
    offset = int(header.get_data_offset())
    if kind is not MGHHeader:
        offset = offset or kind.single_vox_offset  # 0 stands for "right behind the header"
    with np.errstate(all="ignore"):
        affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    _check_affine(affine, shape, path)
    return Header(
        shape=shape,
        affine=affine,
        forms=_forms(header),
        dtype=np.dtype(header.get_data_dtype()),
        offset=offset,
        slope=1.0 if slope is None else float(slope),
        intercept=0.0 if intercept is None else float(intercept),
        header=header,
    )


def _to_millimetres(header: Any) -> None:
    """Turn a NIfTI header whose lengths are in metres or micrometres into one in millimetres."""
    if factor := _MILLIMETRES.get(int(header["xyzt_units"]) & 7):
        header["pixdim"][1:4] *= factor
        for name in ("srow_x", "srow_y", "srow_z", "qoffset_x", "qoffset_y", "qoffset_z"):
            header[name] *= factor
        header["xyzt_units"] = int(header["xyzt_units"]) & ~7 | 2


def _tell_of_no_form(path: Path) -> None:
    """Say, once in this process, that a file does not tell how its axes lie."""
    if not _TOLD.is_set():
        _TOLD.set()
        say(
            f"warning: {path}: no sform and no qform; its axes are taken for right, front and up",
            file=sys.stderr,
        )


def _kind_of(block: bytes, path: Path) -> Any:
    """Choose nibabel's class for a header by the format's own signature."""
    nifti = ending_of(path) in _NIFTI
    if nifti and block[344:347] == b"n+1":
        return Nifti1Header
    if nifti and block[4:7] == b"n+2":
        return Nifti2Header
    if nifti and (block[344:347] == b"ni1" or block[4:7] == b"ni2"):
        raise _unreadable(path, "it is the header of a pair of files; convert the pair to .nii")
    if not nifti and block[:4] == struct.pack(">i", 1) and len(block) == _MGH_BYTES:
        return MGHHeader
    raise _unreadable(path, f"it has no header of {'NIfTI' if nifti else 'FreeSurfer (MGH)'}")


def _forms(header: Any) -> dict[str, Affine]:
    if isinstance(header, MGHHeader):
        return {}
    forms = {"sform": header.get_sform(coded=True), "qform": header.get_qform(coded=True)}
    return {name: np.asarray(form) for name, (form, code) in forms.items() if code and form is not None}


def _check_affine(affine: Affine, shape: tuple[int, ...], path: Path) -> None:
    with np.errstate(all="ignore"):
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        regular = np.isfinite(affine).all() and np.isfinite(spacing).all() and spacing.min() > 0
        regular = regular and abs(np.linalg.det(affine[:3, :3] / spacing)) >= 1e-3
    if not regular:
        raise InputError(f"{path}: expected an affine that can be inverted (got {affine.tolist()})")
    field = spacing * np.array([*shape, 1, 1, 1][:3], dtype=np.float64)
    if spacing.min() < _SMALLEST_VOXEL_MM or field.max() > _LARGEST_FIELD_MM:
        raise InputError(
            f"{path}: expected voxels of at least {_SMALLEST_VOXEL_MM:g} mm and a field of view of at most "
            f"{_LARGEST_FIELD_MM:g} mm (got {_triple(spacing)} mm and {_triple(field)} mm)"
        )
    if np.abs(affine[:3, 3]).max() > _FARTHEST_MM:
        raise InputError(
            f"{path}: expected a first voxel within {_FARTHEST_MM:g} mm of the origin "
            f"(got {_triple(affine[:3, 3])} mm)"
        )


def _triple(values: npt.NDArray[np.float64]) -> str:
    return " × ".join(f"{value:g}" for value in values)


def _check_axes(shape: tuple[int, ...], channel: int | None, path: Path) -> None:
    if channel is None and (len(shape) != 3 or min(shape) < 1):
        raise InputError(f"{path}: expected a volume with 3 axes (got shape {shape})")
    if channel is not None and (len(shape) not in (3, 4) or min(shape) < 1 or channel >= (*shape, 1)[3]):
        raise InputError(
            f"{path}: expected a file with 4 axes and at least {channel + 1} volumes (got shape {shape})"
        )


def _check_size(header: Header, path: Path) -> None:
    """Compare what a header promises with the file and the memory there is, before any of it is taken."""
    voxels = prod(header.shape)
    stored = voxels * header.dtype.itemsize
    size, promised = path.stat().st_size, header.offset + stored
    most = size * _GZIP_RATIO if ending_of(path) in _COMPRESSED else size
    if promised > most:
        raise _unreadable(
            path,
            f"expected {promised} bytes for voxels {header.shape} of {header.dtype}; "
            f"a file of {size} bytes holds at most {most}",
        )
    value = 8 if header.scaled else header.dtype.itemsize
    # The stored bytes, their values, and a copy of these for what follows.
    check_memory(stored + 2 * voxels * value, f"{path}: a volume of {header.shape} voxels of {header.dtype}")


def _check_end(stream: BinaryIO, footer: bool) -> None:
    """Read to the end, where gzip compares its checksum; behind the voxels only a footer or filling may lie.

    Raises:
        ValueError: there is more.
        OSError, EOFError, zlib.error: the checksum or the length is wrong, or the end is missing.
    """
    most = _MOST_FOOTER if footer else _BLOCK - 1
    rest = bytearray()
    while block := stream.read(min(_CHUNK, most + 1 - len(rest))):
        rest += block
        if len(rest) > most:
            break
    filled = len(rest) < _BLOCK and not any(rest)
    if not filled and not (footer and len(rest) <= most and _is_mgh_footer(bytes(rest))):
        raise ValueError(
            f"expected the end behind the voxels that its header counts (got {len(rest)} bytes more)"
        )


def _is_mgh_footer(rest: bytes) -> bool:
    """Whether bytes are five numbers (TR, flip angle, TE, TI, field of view) and tags that end where they do.

    Tags are a number, a length in 64 bits and as many bytes; the old ones 1, 2 and 20 have no length, 30 has
    one in 32 bits.
    """
    place = 20
    while place + 4 <= len(rest):
        (tag,) = struct.unpack_from(">i", rest, place)
        place += 4
        if tag in (0, -1):
            return len(rest) - place < _BLOCK and not any(rest[place:])
        if tag in (1, 2, 20):
            return True
        width = ">i" if tag == 30 else ">q"
        if not 0 < tag <= _LAST_TAG or place + struct.calcsize(width) > len(rest):
            return False
        (length,) = struct.unpack_from(width, rest, place)
        place += struct.calcsize(width) + length
        if length < 0 or place > len(rest):
            return False
    return place >= len(rest)
