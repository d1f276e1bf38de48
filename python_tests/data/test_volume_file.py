import gzip
import struct
import tracemalloc

import nibabel as nib
import numpy as np
import pytest

from timm_ext.data import volume_file
from timm_ext.data.tasks import Region, Task
from timm_ext.data.volume import Volume, read_channels, read_labels, read_volume, write_nifti
from timm_ext.data.volume_file import read_header, read_stored, volume_files
from timm_ext.errors import InputError
from timm_ext.metrics import evaluate_pairs
from timm_ext.synthesis.label_maps import read_label_map
from timm_ext.system import machine

SHAPE = (17, 13, 11)
LABELS = np.random.default_rng(0).choice([0, 2, 3, 41], SHAPE).astype(np.int16)
TASK = Task("all", ("T1",), (Region("A", (2, 3, 41)),), frozenset((0, 2, 3, 41)))


def saved(path, data=LABELS, affine=None):
    kind = nib.MGHImage if path.name.endswith((".mgz", ".mgh")) else nib.Nifti1Image
    nib.save(kind(data, np.eye(4) if affine is None else affine), path)
    return path


def with_bytes(path, position, values):
    content = bytearray(path.read_bytes())
    content[position : position + len(values)] = values
    path.write_bytes(content)
    return path


def flipped(content: bytes, position: int, bit: int = 4) -> bytes:
    changed = bytearray(content)
    changed[position] ^= 1 << bit
    return bytes(changed)


DAMAGES = {
    "a bit of the stream": lambda whole: flipped(whole, len(whole) // 2),
    "the checksum": lambda whole: flipped(whole, -6),
    "the length": lambda whole: flipped(whole, -2),
    "cut by 4": lambda whole: whole[:-4],
    "cut by 8": lambda whole: whole[:-8],
    "cut in the voxels": lambda whole: whole[: len(whole) // 2],
    "text behind": lambda whole: whole + b"<html>done</html>",
    "text behind zeros": lambda whole: whole + bytes(512) + b"x",
    "half of a second stream behind": lambda whole: whole + gzip.compress(b"")[:9],
    "voxels behind": lambda whole: whole + gzip.compress(bytes(4096)),
    "nothing": lambda whole: b"",
    "no gzip": gzip.decompress,
}
READERS = {
    "image": read_volume,
    "labels": read_labels,
    "label map": read_label_map,
    "prediction": lambda path: evaluate_pairs({"a": (path, saved(path.with_name("true.nii")))}, TASK),
    "truth": lambda path: evaluate_pairs({"a": (saved(path.with_name("guess.nii")), path)}, TASK),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", ["a.nii.gz", "a.mgz"])
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_damaged_gzip_is_refused_wherever_volumes_are_read(tmp_path, read, name, damage):
    whole = saved(tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(damage(whole))
    with pytest.raises(InputError, match=rf"^{tmp_path}/{name}: cannot be read") as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.mgz"])
def test_every_flipped_bit_of_a_stream_is_noticed_or_changes_nothing(tmp_path, name):
    whole = saved(tmp_path / name, LABELS[:4, :4, :4]).read_bytes()
    refused = 0
    for position in range(len(whole)):
        (tmp_path / name).write_bytes(flipped(whole, position, position % 8))
        try:
            assert np.array_equal(read_volume(tmp_path / name).data, LABELS[:4, :4, :4])
        except InputError:
            refused += 1
    assert refused >= len(whole) - 20  # the head of gzip holds a time and a name


@pytest.mark.parametrize("name", ["a.nii.gz", "a.mgz"])
def test_intact_streams_in_pieces_or_with_zeros_behind_are_read(tmp_path, name):
    plain = gzip.decompress(saved(tmp_path / name).read_bytes())
    pieces = gzip.compress(plain[:500]) + gzip.compress(plain[500:3000]) + gzip.compress(plain[3000:])
    (tmp_path / name).write_bytes(pieces + bytes(512))
    assert np.array_equal(read_volume(tmp_path / name).data, LABELS)


def test_a_compressed_file_under_a_plain_name(tmp_path):
    (tmp_path / "a.nii").write_bytes(saved(tmp_path / "b.nii.gz").read_bytes())
    with pytest.raises(
        InputError, match=r"a\.nii: cannot be read, expected no gzip stream in a file named \.nii"
    ):
        read_volume(tmp_path / "a.nii")
    (tmp_path / "a.nii.gz").write_bytes(saved(tmp_path / "b.nii").read_bytes())
    with pytest.raises(InputError, match=r"a\.nii\.gz: cannot be read, expected a gzip stream"):
        read_volume(tmp_path / "a.nii.gz")


def test_pairs_of_header_and_voxels(tmp_path):
    nib.save(nib.Nifti1Pair(LABELS, np.eye(4)), tmp_path / "a.img")
    for name in ("a.img", "a.hdr"):
        with pytest.raises(InputError, match=rf"{name}: expected header and voxels in one file"):
            read_volume(tmp_path / name)
    joined = (tmp_path / "a.hdr").read_bytes() + (tmp_path / "a.img").read_bytes()
    (tmp_path / "a.nii").write_bytes(joined)
    with pytest.raises(InputError, match=r"a\.nii: .*it is the header of a pair of files"):
        read_volume(tmp_path / "a.nii")


@pytest.mark.parametrize("name", ["a.nii", "a.mgh"])
def test_files_longer_than_their_header_says_are_refused(tmp_path, name):
    saved(tmp_path / name)
    place, fewer = (42, struct.pack("<h", 16)) if name == "a.nii" else (4, struct.pack(">i", 16))
    with pytest.raises(InputError, match=rf"{name}: cannot be read.*expected the end behind the voxels"):
        read_volume(with_bytes(tmp_path / name, place, fewer))


@pytest.mark.parametrize(("filling", "read"), [(511, True), (512, False), (100_000, False)])
def test_zeros_that_fill_a_block(tmp_path, filling, read):
    path = saved(tmp_path / "a.nii")
    path.write_bytes(path.read_bytes() + bytes(filling))
    if read:
        assert np.array_equal(read_volume(path).data, LABELS)
    else:
        with pytest.raises(InputError, match="expected the end behind the voxels"):
            read_volume(path)


def tag(number, content):
    return struct.pack(">iq", number, len(content)) + content


@pytest.mark.parametrize(
    ("footer", "read"),
    [
        (b"", True),
        (struct.pack(">5f", 2300, 0.1, 2, 900, 256), True),
        (
            struct.pack(">5f", 1, 2, 3, 4, 5) + tag(31, b"/transforms/talairach.xfm\0") + tag(3, bytes(9000)),
            True,
        ),
        (struct.pack(">5f", 1, 2, 3, 4, 5) + tag(3, b"x" * 50)[:-1], False),
        (struct.pack(">5f", 1, 2, 3, 4, 5) + b"\1\1\1\1" * 200, False),
        (struct.pack(">5f", 1, 2, 3, 4, 5) + struct.pack(">iq", 3, -50), False),
        (bytes(511), True),
        (bytes(4096), False),
    ],
)
def test_footers_of_freesurfer_files(tmp_path, footer, read):
    path = saved(tmp_path / "a.mgh")
    path.write_bytes(path.read_bytes()[: 284 + LABELS.nbytes] + footer)
    if read:
        assert np.array_equal(read_volume(path).data, LABELS)
    else:
        with pytest.raises(InputError, match="expected the end behind the voxels"):
            read_volume(path)


def test_each_file_is_decompressed_once(tmp_path, monkeypatch):
    given = []

    class Counting(volume_file._Stream):
        def read(self, size=-1):
            given.append(len(block := super().read(size)))
            return block

        def rewind(self):
            raise AssertionError("a second pass")

    monkeypatch.setattr(volume_file, "_Stream", Counting)
    for name in ("a.nii.gz", "a.mgz"):
        given.clear()
        path = saved(tmp_path / name)
        plain = len(gzip.decompress(path.read_bytes()))
        given.clear()
        assert np.array_equal(read_stored(path)[0][0], LABELS)
        assert LABELS.nbytes < sum(given) <= plain


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mgh", "a.mgz"])
def test_a_small_file_that_promises_a_large_volume(tmp_path, name):
    path = saved(tmp_path / name)
    plain = path.read_bytes() if name in ("a.nii", "a.mgh") else gzip.decompress(path.read_bytes())
    lengths = (42, struct.pack("<3h", *[1500] * 3)) if "nii" in name else (4, struct.pack(">3i", *[1500] * 3))
    plain = plain[: lengths[0]] + lengths[1] + plain[lengths[0] + len(lengths[1]) :]
    path.write_bytes(plain if name in ("a.nii", "a.mgh") else gzip.compress(plain))
    with pytest.raises(
        InputError, match=rf"{name}: cannot be read.*expected \d+ bytes for voxels \(1500, 1500"
    ):
        read_volume(path)


def test_a_stream_that_goes_on_and_on_is_left_early(tmp_path):
    plain = saved(tmp_path / "a.nii").read_bytes()
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(plain + bytes(300 << 20), 1))
    with pytest.raises(InputError, match="expected the end behind the voxels"):
        read_volume(tmp_path / "a.nii.gz")


def test_a_volume_that_does_not_fit_in_memory(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.nii.gz")
    monkeypatch.setattr(machine, "available_memory", lambda: 3 * LABELS.nbytes - 1)
    told = r"a\.nii\.gz: a volume of \(17, 13, 11\) voxels of int16: .* 14,585 bytes of memory.*14,586"
    with pytest.raises(InputError, match=told):
        read_volume(path)
    monkeypatch.setattr(machine, "available_memory", lambda: 3 * LABELS.nbytes)
    assert np.array_equal(read_volume(path).data, LABELS)


@pytest.mark.parametrize(
    ("affine", "message"),
    [
        (np.diag([1e12, 1, 1, 1]), r"a field of view of at most 100000 mm \(got 1e\+12 × 1 × 1 mm"),
        (np.diag([1, 1e4, 1, 1]), r"a field of view of at most 100000 mm"),
        (np.diag([1, 1, 1e-9, 1]), r"expected voxels of at least 1e-06 mm"),
        (
            np.array([[1.0, 0, 0, 0], [0, 1, 0, -1e12], [0, 0, 1, 0], [0, 0, 0, 1]]),
            r"within 1e\+07 mm of the origin",
        ),
        (
            np.array([[1.0, 0, 0, np.nan], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
            r"an affine that can be inverted",
        ),
        (np.diag([1, np.inf, 1, 1]), r"an affine that can be inverted"),
    ],
)
@pytest.mark.parametrize("name", ["a.nii", "a.mgz"])
def test_places_in_space_that_make_no_sense(tmp_path, affine, message, name):
    if name == "a.nii":
        image = nib.Nifti1Image(LABELS, np.eye(4))
        image.header["srow_x"], image.header["srow_y"], image.header["srow_z"] = affine[:3]
        image.header["sform_code"] = 1
        content = image.header.binaryblock + bytes(4) + LABELS.tobytes("F")
        (tmp_path / name).write_bytes(content)
    else:
        content = bytearray(gzip.decompress(saved(tmp_path / name).read_bytes()))
        with np.errstate(all="ignore"):
            spacing = np.linalg.norm(affine[:3, :3], axis=0)
            centre = affine[:3, 3] + spacing * np.array(SHAPE) / 2
        struct.pack_into(">3f", content, 30, *spacing)
        struct.pack_into(">9f", content, 42, *np.eye(3).ravel())
        struct.pack_into(">3f", content, 78, *centre)
        (tmp_path / name).write_bytes(gzip.compress(content))
    for read in (read_volume, read_header):
        with pytest.raises(InputError, match=rf"{name}: expected.*" if name == "a.mgz" else message):
            read(tmp_path / name)


@pytest.mark.parametrize(
    ("position", "values"),
    [
        (42, struct.pack("<h", -5)),
        (42, struct.pack("<h", 0)),
        (40, struct.pack("<h", 9)),
        (40, struct.pack("<h", -3)),
        (70, struct.pack("<h", 77)),
        (108, struct.pack("<f", np.nan)),
        (108, struct.pack("<f", -352)),
        (108, struct.pack("<f", 1e30)),
        (108, struct.pack("<f", 353)),
        (108, struct.pack("<f", 16)),
        (112, struct.pack("<2f", 1, np.inf)),
        (0, bytes(348)),
    ],
)
def test_headers_that_make_no_sense_are_one_line_without_a_word_of_nibabel(tmp_path, capfd, position, values):
    path = with_bytes(saved(tmp_path / "a.nii"), position, values)
    with pytest.raises(InputError, match=r"a\.nii: ") as error:
        read_volume(path)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_headers_that_nibabel_mends_are_read_without_a_word(tmp_path, capfd):
    path = with_bytes(saved(tmp_path / "a.nii"), 76, struct.pack("<f", 0))  # qfac
    with_bytes(path, 72, struct.pack("<h", 8))  # bitpix
    assert np.array_equal(read_volume(path).data, LABELS)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image, nib.MGHImage])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32])
def test_values_and_place_are_those_of_nibabel(tmp_path, kind, dtype):
    affine = np.array([[0, -1.5, 0, 3], [-1, 0, 0, 4], [0, 0, 2, -5], [0, 0, 0, 1.0]])
    path = tmp_path / ("a.mgz" if kind is nib.MGHImage else "a.nii.gz")
    image = kind(LABELS.astype(dtype), affine)
    if kind is not nib.MGHImage and dtype != np.float32:
        image.header.set_slope_inter(0.25, -3)
    nib.save(image, path)
    expected = nib.load(path)
    (values,), header = read_stored(path)
    assert values.dtype == expected.get_data_dtype() or header.scaled
    assert np.array_equal(values, np.asanyarray(expected.dataobj))
    assert np.array_equal(header.affine, expected.affine)


@pytest.mark.parametrize(
    ("header_type", "most"), [(np.uint8, 1), (np.uint8, 3), (np.int16, 41), (np.int32, 41)]
)
def test_labels_written_as_float_under_a_header_of_integers(tmp_path, header_type, most):
    labels = np.minimum(LABELS, most).astype(np.float64)
    header = nib.Nifti1Image(LABELS.astype(header_type), np.eye(4)).header
    nib.save(nib.Nifti1Image(labels, np.eye(4), header), tmp_path / "a.nii.gz")
    assert np.array_equal(read_labels(tmp_path / "a.nii.gz").data, labels)


@pytest.mark.parametrize(("value", "label"), [(0.9999, 1), (2.0009, 2), (2035.0001, 2035)])
def test_labels_next_to_whole_numbers(tmp_path, value, label):
    saved(tmp_path / "a.nii", np.array([[[0.0, value]]], dtype=np.float32))
    assert read_labels(tmp_path / "a.nii").data.tolist() == [[[0, label]]]


@pytest.mark.parametrize("value", [0.5, 0.998, 1.0011, 2035.5])
def test_fractions_are_told_with_their_digits(tmp_path, value):
    saved(tmp_path / "a.nii", np.array([[[0.0, value]]], dtype=np.float64))
    with pytest.raises(InputError, match=rf"got {value} at voxel \(0, 0, 1\)\)"):
        read_labels(tmp_path / "a.nii")


def test_scaled_fractions_are_told_with_their_scaling(tmp_path):
    image = nib.Nifti1Image(np.array([[[0, 3]]], dtype=np.int16), np.eye(4))
    image.header.set_slope_inter(1.0078125, 0)
    nib.save(image, tmp_path / "a.nii")
    with pytest.raises(InputError, match=r"got 3\.0234375 at voxel .*stored with scl_slope 1\.0078125"):
        read_labels(tmp_path / "a.nii")


def test_volumes_of_a_folder(tmp_path):
    for name in ("1.3.12.2.nii.gz", "b.mgz", "c.nii", "._c.nii", "notes.txt"):
        (tmp_path / name).touch()
    assert volume_files(tmp_path) == {
        "1.3.12.2": tmp_path / "1.3.12.2.nii.gz",
        "b": tmp_path / "b.mgz",
        "c": tmp_path / "c.nii",
    }
    (tmp_path / "b.nii.gz").touch()
    with pytest.raises(InputError, match=r"one label map per name \(got b\.mgz, b\.nii\.gz\)"):
        volume_files(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        volume_files(tmp_path / "none")


def test_a_compressed_volume_is_held_in_memory_once(tmp_path):
    values = np.random.default_rng(0).integers(0, 5, (200, 200, 200)).astype(np.int16)
    path = saved(tmp_path / "a.nii.gz", values)
    tracemalloc.start()
    try:
        assert np.array_equal(read_stored(path)[0][0], values)
        assert tracemalloc.get_traced_memory()[1] < 1.3 * values.nbytes + (1 << 24)
    finally:
        tracemalloc.stop()


def test_a_header_alone_takes_no_voxels(tmp_path):
    path = saved(tmp_path / "a.nii.gz", np.zeros((3, 4, 5, 2), np.int16))
    assert read_header(path).shape == (3, 4, 5, 2)
    assert set(read_header(path).forms) == {"sform"}


def test_writing_needs_no_more_than_the_header_of_the_input(tmp_path):
    path = saved(tmp_path / "a.nii.gz")
    path.write_bytes(path.read_bytes()[:-4])
    write_nifti(tmp_path / "b.nii.gz", Volume(LABELS, np.eye(4)), like=path)
    assert np.array_equal(read_volume(tmp_path / "b.nii.gz").data, LABELS)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.mgz"])
def test_several_volumes_of_one_file_are_read_in_one_pass(tmp_path, name, monkeypatch):
    values = np.stack([LABELS, LABELS + 1, LABELS + 2], axis=-1)
    path, opened = saved(tmp_path / name, values), []
    stream = volume_file._Stream
    monkeypatch.setattr(volume_file, "_Stream", lambda **given: opened.append(1) or stream(**given))
    volumes = read_channels(path, [2, 0])
    assert [np.array_equal(v.data, LABELS + n) for v, n in zip(volumes, (2, 0), strict=True)] == [True, True]
    assert volumes[0].data.base is None
    assert opened == [1]
