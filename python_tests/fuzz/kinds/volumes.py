"""Volumes: NIfTI and FreeSurfer files, plain and compressed, their headers, label maps and cached cases."""

import functools
import gzip
import math
import random
import struct
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from fuzz import Outcome, kind, mutate, scratch

from timm_ext.data.formats.cases import Case
from timm_ext.data.prepare import PrepareSettings, prepare_case
from timm_ext.data.store import read_array, read_entry
from timm_ext.data.tasks import Region, Task
from timm_ext.data.volume import Volume, read_labels, read_volume, resample, resampled_shape, to_canonical
from timm_ext.metrics import evaluate_pairs

SHAPE = (9, 7, 5)
TASK = Task("one", ("T1",), (Region("A", (1, 2)),), frozenset(range(4)))
NIFTI_TYPES = {
    2: "u1",
    4: "i2",
    8: "i4",
    16: "f4",
    64: "f8",
    256: "i1",
    512: "u2",
    768: "u4",
    1024: "i8",
    1280: "u8",
}
MGH_TYPES = {0: "u1", 1: "i4", 3: "f4", 4: "i2"}
FLOATS = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    1e-30,
    1e-9,
    0.5,
    1.00000006,
    7.5,
    1e4,
    1e12,
    3e38,
    math.nan,
    math.inf,
    -math.inf,
]
WHOLES = [0, 1, -1, 2, 3, 4, 5, 7, 8, 9, 16, 64, 127, 128, 256, 512, 768, 1500, 32767, -32768]
AFFINE = np.array([[-1.0, 0.1, 0, 4], [0.1, 1.5, 0, -3], [0, 0, 2, 7], [0, 0, 0, 1]])
SAMPLES = ("a.nii", "b.nii", "c.nii", "d.nii", "a.mgh", "b.mgh")


@functools.cache
def sample(name: str) -> bytes:
    """An uncompressed file: NIfTI-1 in both byte orders, scaled, NIfTI-2, FreeSurfer."""
    generator = np.random.default_rng(0)
    data = generator.integers(0, 4, SHAPE)
    kinds: dict[str, tuple[Any, Any, str]] = {
        "a.nii": (nib.Nifti1Image, nib.Nifti1Header(), "i2"),
        "b.nii": (nib.Nifti1Image, nib.Nifti1Header(endianness=">"), "f4"),
        "c.nii": (nib.Nifti1Image, nib.Nifti1Header(), "u1"),
        "d.nii": (nib.Nifti2Image, nib.Nifti2Header(), "i4"),
        "a.mgh": (nib.MGHImage, None, "u1"),
        "b.mgh": (nib.MGHImage, None, "f4"),
    }
    make, header, dtype = kinds[name]
    image = make(data.astype(dtype), AFFINE, header)
    if name == "c.nii":
        image.header.set_slope_inter(0.5, -1)
    if header is not None:
        image.set_qform(AFFINE, code=1)
    nib.save(image, scratch() / name)
    return (scratch() / name).read_bytes()


def write(folder: Path, name: str, plain: bytes, compressed: bool) -> Path:
    """Write a file's content under a fitting name."""
    ending = {".nii": ".nii.gz", ".mgh": ".mgz"}[name[1:]] if compressed else name[1:]
    path = folder / f"{name[0]}{ending}"
    path.write_bytes(gzip.compress(plain, 1) if compressed else plain)
    return path


def told_by(plain: bytes, name: str) -> np.ndarray[Any, Any]:
    """The voxels of a file, read by hand from its header's fields."""
    if name.endswith(".mgh"):
        width, height, depth, frames, code = struct.unpack_from(">5i", plain, 4)
        assert frames == 1
        dtype = np.dtype(f">{MGH_TYPES[code]}")
        return np.frombuffer(plain, dtype, width * height * depth, 284).reshape(
            (width, height, depth), order="F"
        )
    second = plain[4:7] == b"n+2"
    layout, size, first = (nib.Nifti2Header, 540, 544) if second else (nib.Nifti1Header, 348, 352)
    raw = layout(plain[:size], check=False)
    dims = [int(length) for length in raw["dim"]]
    lengths = dims[1 : 1 + dims[0]]
    assert all(length == 1 for length in lengths[3:])
    shape = (lengths[0], lengths[1], lengths[2])
    dtype = np.dtype(f"{raw.endianness}{NIFTI_TYPES[int(raw['datatype'])]}")
    offset = int(raw["vox_offset"]) or first
    data = np.frombuffer(plain, dtype, math.prod(shape), offset).reshape(shape, order="F")
    slope, inter = float(raw["scl_slope"]), float(raw["scl_inter"])
    if slope == 0 or not math.isfinite(slope) or (slope, inter) == (1, 0):
        return data
    return data.astype(np.float64) * slope + inter


def checked(path: Path, plain: bytes, name: str) -> Volume:
    """Read a volume, compare it with what its bytes say, and work on it as the preparation does."""
    volume = read_volume(path)
    expected = told_by(plain, name)
    assert volume.shape == expected.shape
    scale = np.abs(expected.astype(np.float64)).max()
    assert np.allclose(volume.data, expected, rtol=1e-6, atol=1e-6 * scale)
    assert np.isfinite(volume.affine).all()
    turned = to_canonical(volume)
    if math.prod(resampled_shape(turned, (2.0, 2.0, 2.0))) < 1_000_000:
        assert np.isfinite(resample(turned, (2.0, 2.0, 2.0), "linear").data).all() or scale > 1e30
    return volume


def odd_bytes(rng: random.Random, width: int, order: str) -> bytes:
    """A number that hardly any field of a header expects."""
    if rng.random() < 0.2:
        return rng.randbytes(width)
    if width == 2:
        return struct.pack(f"{order}h", rng.choice(WHOLES))
    if rng.random() < 0.5:
        return struct.pack(f"{order}{'f' if width == 4 else 'd'}", rng.choice(FLOATS))
    return struct.pack(f"{order}{'i' if width == 4 else 'q'}", rng.choice([*WHOLES, 2**31 - 1, -(2**31)]))


def with_odd_fields(rng: random.Random, plain: bytes, name: str) -> bytes:
    """Change one to three fields of a header, as the format lays them out."""
    content = bytearray(plain)
    for _ in range(rng.randint(1, 3)):
        if name.endswith(".mgh"):
            start, width, order = rng.choice([*range(0, 28, 4), 28, *range(30, 90, 4)]), 4, ">"
            width = 2 if start == 28 else 4
        else:
            layout = nib.Nifti2Header if name == "d.nii" else nib.Nifti1Header
            fields = layout.template_dtype.fields
            field, offset = rng.choice([(field, offset) for field, offset, *_ in fields.values()])
            base = field.base.itemsize
            count = math.prod(field.shape)
            width = base if base in (2, 4, 8) else 1
            start, order = offset + base * rng.randrange(count), ">" if name == "b.nii" else "<"
        values = odd_bytes(rng, width, order) if width > 1 else rng.randbytes(1)
        content[start : start + width] = values
    return bytes(content)


@kind("volume-bytes", seconds=5)
def damaged_plain(rng: random.Random, folder: Path) -> Outcome:
    name = rng.choice(SAMPLES)
    plain = mutate.damaged(rng, sample(name))
    checked(write(folder, name, plain, compressed=False), plain, name)
    return Outcome.SAME if plain == sample(name) else Outcome.RIGHT


@kind("volume-header", seconds=5)
def odd_header(rng: random.Random, folder: Path) -> Outcome:
    name = rng.choice(SAMPLES)
    plain = with_odd_fields(rng, sample(name), name)
    checked(write(folder, name, plain, compressed=rng.random() < 0.5), plain, name)
    return Outcome.RIGHT


@kind("volume-gzip", seconds=5)
def damaged_stream(rng: random.Random, folder: Path) -> Outcome:
    name = rng.choice(SAMPLES)
    path = write(folder, name, sample(name), compressed=True)
    path.write_bytes(mutate.damaged(rng, path.read_bytes()))
    volume = checked(path, sample(name), name)
    assert np.allclose(volume.affine, AFFINE, atol=1e-5)
    return Outcome.SAME


@kind("volume-stream", seconds=5)
def odd_stream(rng: random.Random, folder: Path) -> Outcome:
    """Streams in pieces, with something behind them, with other endings, or of more than they say."""
    name = rng.choice(SAMPLES)
    plain = sample(name)
    cut = rng.randrange(len(plain))
    behind = [b"", bytes(rng.randint(1, 2000)), rng.randbytes(rng.randint(1, 50)), gzip.compress(b""), plain]
    pieces = gzip.compress(plain[:cut]) + gzip.compress(plain[cut:]) + rng.choice(behind)
    more = gzip.compress(
        plain + rng.choice([bytes(rng.randint(1, 1000)), bytes(50 << 20), rng.randbytes(9)]), 1
    )
    path = write(folder, name, plain, compressed=True)
    path.write_bytes(
        rng.choice([pieces, pieces, more, plain, b"", gzip.compress(b""), gzip.compress(plain[:cut])])
    )
    if rng.random() < 0.2:
        other = rng.choice([".nii", ".nii.gz", ".mgz", ".mgh", ".img", ".hdr", ".hdr.gz", ".txt", ".NII"])
        path = path.rename(folder / f"x{other}")
    checked(path, plain, name)
    return Outcome.RIGHT


@kind("volume-labels", seconds=5)
def odd_labels(rng: random.Random, folder: Path) -> Outcome:
    """Labels of any type under any scaling: the whole numbers next to their values, or refused."""
    generator = np.random.default_rng(rng.randrange(2**32))
    stored = generator.integers(0, 50, SHAPE).astype(rng.choice(["u1", "i2", "i4", "f4", "f8"]))
    if stored.dtype.kind == "f":
        stored += stored.dtype.type(rng.choice([0, 1e-7, 1e-4, 9e-4, 2e-3, 0.5]))
    image = nib.Nifti1Image(stored, AFFINE)
    slope = rng.choice([1.0, 1.00000006, 0.99999994, 1.00001, 0.5, 2.0, 1.01, -1.0])
    inter = rng.choice([0.0, 0.0, 1.0, 0.0005, 0.25, -3.0])
    image.header.set_slope_inter(slope, inter)
    nib.save(image, folder / "a.nii.gz")
    slope, inter = float(np.float32(slope)), float(np.float32(inter))
    values = stored.astype(np.float64) * slope + inter
    apart = np.abs(values - np.rint(values)).max()
    if (apart > 1.01e-3) or values.min() < -0.5:
        read_labels(folder / "a.nii.gz")
        raise AssertionError("fractions or negative numbers were taken for labels")
    if apart > 0.99e-3:
        return Outcome.SAME
    assert np.array_equal(read_labels(folder / "a.nii.gz").data, np.rint(values))
    return Outcome.RIGHT


@kind("volume-evaluate", seconds=10)
def evaluate_damaged(rng: random.Random, folder: Path) -> Outcome:
    """A damaged prediction or truth is never scored."""
    names = ["a.nii", "a.mgh"]
    paths = []
    for place, damaged in enumerate(rng.choice([(True, False), (False, True)])):
        (folder / str(place)).mkdir()
        path = write(folder / str(place), rng.choice(names), sample("a.nii"), compressed=True)
        path = write(folder / str(place), "a.nii", sample("a.nii"), compressed=True)
        if damaged:
            path.write_bytes(mutate.damaged(rng, path.read_bytes()))
        paths.append(path)
    scores = evaluate_pairs({"case": (paths[0], paths[1])}, TASK).cases["case"]
    assert scores["A"] == {"dice": 1.0, "hd95": 0.0}
    return Outcome.SAME


@kind("volume-prepare", seconds=20)
def prepare_odd(rng: random.Random, folder: Path) -> Outcome:
    """Prepare a scan with an odd header at 2 mm, and bring a prediction back to its grid."""
    name = rng.choice(SAMPLES)
    plain = with_odd_fields(rng, sample(name), name)
    path = write(folder, name, plain, compressed=rng.random() < 0.5)
    volume = read_volume(path)
    if math.prod(resampled_shape(volume, (2.0, 2.0, 2.0))) > 1_000_000:
        return Outcome.SAME
    prepared = prepare_case(
        Case("a", {"T1": path}, None), TASK, PrepareSettings(spacing=2.0), folder / "cache"
    )
    assert np.isfinite(prepared.image).all()
    assert prepared.grid.restore(np.ones(prepared.shape, np.float32)).shape == volume.shape
    return Outcome.RIGHT


@functools.cache
def cached_case() -> tuple[Case, bytes]:
    """A case, and the bytes of its entry in the cache."""
    for name, file in (("image", "a.nii"), ("label", "a.nii")):
        (scratch() / f"{name}.nii").write_bytes(sample(file))
    case = Case("a", {"T1": scratch() / "image.nii"}, scratch() / "label.nii")
    prepare_case(case, TASK, PrepareSettings(), scratch() / "cache")
    (entry,) = (scratch() / "cache").glob("*.safetensors")
    return case, entry.read_bytes()


@kind("volume-cache", seconds=5)
def damaged_entry(rng: random.Random, folder: Path) -> Outcome:
    """A damaged entry of the cache is noticed and made again."""
    case, whole = cached_case()
    (name,) = (path.name for path in (scratch() / "cache").glob("*.safetensors"))
    entry = folder / name
    entry.write_bytes(mutate.damaged(rng, whole))
    accepted = read_entry(entry) is not None
    prepared = prepare_case(case, TASK, PrepareSettings(), folder)
    if not accepted:
        assert entry.read_bytes() == whole
        return Outcome.RIGHT
    good = scratch() / "cache" / name
    assert all(np.array_equal(read_array(entry, key), read_array(good, key)) for key in ("image", "label"))
    assert read_entry(entry) == read_entry(good)
    assert prepared.present == (0, 1, 2, 3)
    return Outcome.SAME
