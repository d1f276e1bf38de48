import gzip
import itertools
import resource
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from timm_ext.data.volume import (
    Volume,
    from_canonical,
    read_labels,
    read_volume,
    resample,
    resample_to,
    same_grid,
    spacing_of,
    to_canonical,
    write_nifti,
)
from timm_ext.errors import InputError

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")


def rotation(degrees, axis=2):
    angle, (first, second) = np.deg2rad(degrees), [other for other in range(3) if other != axis]
    matrix = np.eye(3)
    matrix[first, first] = matrix[second, second] = np.cos(angle)
    matrix[first, second], matrix[second, first] = -np.sin(angle), np.sin(angle)
    return matrix


def affine_of(linear, origin=(-10.0, 5.0, 7.0)):
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = linear, origin
    return affine


OBLIQUE = affine_of(rotation(20) @ rotation(10, axis=0) @ np.diag([-1.0, 1.5, 2.0]))


def ramp(volume_affine, shape, dtype=np.float32):
    """An image whose intensity is 2x + 3y − z + 1 of the voxel's RAS position."""
    index = np.stack([*np.indices(shape), np.ones(shape)]).reshape(4, -1)
    x, y, z, _ = volume_affine @ index
    return (2 * x + 3 * y - z + 1).reshape(shape).astype(dtype)


def save(path, data, affine=None, **header):
    image = nib.Nifti1Image(data, np.eye(4) if affine is None else affine)
    for key, value in header.items():
        image.header[key] = value
    nib.save(image, path)
    return path


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("flips", list(itertools.product([False, True], repeat=3)))
def test_canonical_and_back_for_all_48_orientations(order, flips):
    canonical = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    affine = affine_of(np.diag([1.0, 1.5, 2.0]))
    stored = canonical.transpose(order)
    linear, origin = affine[:3, order], affine[:3, 3].copy()
    for axis in np.flatnonzero(flips):
        origin += linear[:, axis] * (stored.shape[axis] - 1)
        stored = np.flip(stored, axis)
        linear[:, axis] *= -1
    turned = to_canonical(Volume(stored, affine_of(linear, origin)))
    assert np.array_equal(turned.data, canonical)
    assert np.allclose(turned.affine, affine)
    back = from_canonical(turned, affine_of(linear, origin))
    assert np.array_equal(back.data, stored)
    assert np.allclose(back.affine, affine_of(linear, origin))


def test_canonical_leaves_every_voxel_of_an_oblique_volume_in_place():
    volume = to_canonical(Volume(ramp(OBLIQUE, (4, 5, 6)), OBLIQUE))
    assert np.allclose(volume.data, ramp(volume.affine, volume.shape), atol=1e-4)
    assert (np.diag(volume.affine)[:3] > 0).all()


def test_canonical_turns_channels_alike():
    data = np.stack([ramp(OBLIQUE, (4, 5, 6)), -ramp(OBLIQUE, (4, 5, 6))])
    volume = to_canonical(Volume(data, OBLIQUE))
    assert volume.data.shape[0] == 2
    assert np.array_equal(volume.data[0], -volume.data[1])


@needs_shared
def test_reads_a_freesurfer_scan_in_lia():
    scan = read_volume(SHARED / "real_t1" / "brain.mgz")
    assert scan.data.shape == (256, 256, 256)
    assert scan.data.dtype == np.uint8
    assert nib.aff2axcodes(scan.affine) == ("L", "I", "A")
    aseg = read_labels(SHARED / "real_t1" / "aseg.mgz")
    assert same_grid(scan, aseg)
    assert {2, 41, 10, 49} <= set(np.unique(aseg.data).tolist())
    turned = to_canonical(aseg)
    left, right = (np.argwhere(turned.data == code).mean(axis=0) for code in (10, 49))
    assert left[0] < right[0]  # thalami: D runs from left to right
    assert np.array_equal(from_canonical(turned, aseg.affine).data, aseg.data)


@needs_shared
def test_reads_a_tumour_case_with_negative_intensities():
    scan = read_volume(SHARED / "tumour" / "TCGA-DU-7294_t1.nii.gz")
    labels = read_labels(SHARED / "tumour" / "TCGA-DU-7294_seg-fusion.nii.gz")
    assert scan.data.shape == (240, 240, 155)
    assert scan.data.min() == -69
    assert np.unique(labels.data).tolist() == [0, 1, 2]
    assert same_grid(scan, labels)


def test_scaling_byte_order_and_trailing_axes(tmp_path):
    image = nib.Nifti1Image(np.arange(24, dtype=">i2").reshape(2, 3, 4, 1), np.eye(4))
    image.header.set_slope_inter(0.5, 10)
    nib.save(image, tmp_path / "a.nii")
    volume = read_volume(tmp_path / "a.nii")
    assert volume.shape == (2, 3, 4)
    assert volume.data.dtype.isnative
    stored = nib.load(tmp_path / "a.nii").get_fdata()[..., 0]
    assert np.array_equal(volume.data, stored)


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.9])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mgz", "a.mgh"])
def test_truncated_file(tmp_path, name, kept):
    data = np.random.default_rng(0).integers(0, 9999, (12, 12, 12)).astype(np.int16)
    image = nib.Nifti1Image(data, np.eye(4)) if "nii" in name else nib.MGHImage(data, np.eye(4))
    nib.save(image, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(
        InputError, match=rf"{name}: cannot be read, the file is truncated or corrupt"
    ) as error:
        read_volume(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.nii", "a.mgh"])
def test_damaged_headers_are_read_or_refused(tmp_path, name):
    data = np.zeros((4, 4, 4), dtype=np.int16)
    nib.save(
        nib.Nifti1Image(data, np.eye(4)) if name == "a.nii" else nib.MGHImage(data, np.eye(4)),
        tmp_path / name,
    )
    whole = (tmp_path / name).read_bytes()
    generator, refused = np.random.default_rng(0), 0
    for _ in range(50):
        content = bytearray(whole)
        for position in generator.integers(0, 348, 8):
            content[position] = generator.integers(256)
        (tmp_path / name).write_bytes(content)
        try:
            volume = read_volume(tmp_path / name)
        except InputError as error:
            refused += str(error).startswith(str(tmp_path / name))
        else:
            assert np.isfinite(volume.data).all()
    assert refused > 5


@pytest.mark.parametrize("content", [b"", b"no volume at all", gzip.compress(b"no volume at all", mtime=0)])
def test_file_of_another_kind(tmp_path, content):
    (tmp_path / "a.nii.gz").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.nii\.gz: cannot be read"):
        read_volume(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("shape", [(3, 3), (3, 3, 3, 2), (3, 3, 3, 1, 2)])
def test_volumes_of_other_than_three_axes(tmp_path, shape):
    save(tmp_path / "a.nii", np.zeros(shape, dtype=np.int16))
    with pytest.raises(InputError, match=r"a\.nii: expected a volume with 3 axes \(got shape \(3, 3"):
        read_volume(tmp_path / "a.nii")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_voxels_that_are_not_finite(tmp_path, bad):
    data = np.ones((2, 3, 4), dtype=np.float32)
    data[1, 2, 3] = data[1, 0, 0] = bad
    save(tmp_path / "a.nii", data)
    with pytest.raises(
        InputError, match=r"finite voxels \(got 2 NaN or infinite, the first at \(1, 0, 0\)\)"
    ):
        read_volume(tmp_path / "a.nii")
    zeroed = read_volume(tmp_path / "a.nii", nonfinite="zero").data
    assert zeroed.sum() == 22
    assert zeroed[1, 2, 3] == 0


def test_singular_affine(tmp_path):
    image = nib.Nifti1Image(np.zeros((2, 2, 2), dtype=np.int16), np.eye(4))
    image.header["sform_code"], image.header["srow_z"] = 1, (0, 1, 0, 0)
    image.header["srow_y"] = (0, 1, 0, 0)
    image._affine = image.header.get_best_affine()
    nib.save(image, tmp_path / "a.nii")
    with pytest.raises(InputError, match=r"a\.nii: expected an affine that can be inverted \(got \[\["):
        read_volume(tmp_path / "a.nii")


def test_other_read_errors(tmp_path):
    with pytest.raises(InputError, match=r"none\.nii: no such file"):
        read_volume(tmp_path / "none.nii")
    with pytest.raises(InputError, match=r"scan\.dcm: expected a file that ends in \.nii"):
        read_volume(tmp_path / "scan.dcm")
    save(tmp_path / "complex.nii", np.zeros((2, 2, 2), dtype=np.complex64))
    with pytest.raises(InputError, match="expected real numbers"):
        read_volume(tmp_path / "complex.nii")


def test_labels_stored_as_floating_point(tmp_path):
    save(tmp_path / "a.nii", np.array([[[0.0, 41.0]]], dtype=np.float32))
    labels = read_labels(tmp_path / "a.nii")
    assert labels.data.dtype == np.int32
    assert labels.data.tolist() == [[[0, 41]]]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1.5, r"whole numbers as labels \(got 1\.5 at voxel \(0, 0, 1\)\)"),
        (-1.0, r"from 0 on \(got -1 to 0\)"),
    ],
)
def test_bad_labels(tmp_path, value, message):
    save(tmp_path / "a.nii", np.array([[[0.0, value]]], dtype=np.float32))
    with pytest.raises(InputError, match=message):
        read_labels(tmp_path / "a.nii")


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_written_on_the_grid_of_the_input(tmp_path, kind):
    source = kind(np.ones((4, 5, 6), dtype=np.int16), OBLIQUE)
    source.set_sform(OBLIQUE, code=4)
    source.set_qform(affine_of(rotation(5)), code=2)
    source.header.set_xyzt_units("mm", "sec")
    source.header["cal_max"] = 100
    nib.save(source, tmp_path / "scan.nii.gz")
    values = np.arange(120, dtype=np.uint8).reshape(4, 5, 6)
    scan = read_volume(tmp_path / "scan.nii.gz")
    write_nifti(tmp_path / "out" / "seg.nii.gz", Volume(values, scan.affine), like=tmp_path / "scan.nii.gz")
    old, new = nib.load(tmp_path / "scan.nii.gz"), nib.load(tmp_path / "out" / "seg.nii.gz")
    assert type(new) is type(old)
    assert np.array_equal(np.asanyarray(new.dataobj), values)
    assert new.get_data_dtype() == np.uint8
    for form in ("sform", "qform"):
        assert new.header[f"{form}_code"] == old.header[f"{form}_code"]
        assert np.array_equal(getattr(new, f"get_{form}")(), getattr(old, f"get_{form}")())
    assert new.header.get_xyzt_units() == ("mm", "sec")
    assert new.header["cal_max"] == 0


def test_written_like_a_freesurfer_scan(tmp_path):
    lia = affine_of([[-1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
    nib.save(nib.MGHImage(np.ones((3, 4, 5), dtype=np.uint8), lia), tmp_path / "scan.mgz")
    write_nifti(tmp_path / "a.nii", Volume(np.ones((3, 4, 5), np.uint8), lia), like=tmp_path / "scan.mgz")
    image = nib.load(tmp_path / "a.nii")
    assert np.allclose(image.affine, lia)
    assert (image.header["sform_code"], image.header["qform_code"]) == (1, 1)


@pytest.mark.parametrize("dtype", [np.bool_, np.int64, np.uint64, np.float16])
def test_types_that_nifti_lacks(tmp_path, dtype):
    write_nifti(tmp_path / "a.nii", Volume(np.eye(3, dtype=dtype)[None], np.eye(4)))
    assert np.array_equal(read_volume(tmp_path / "a.nii").data, np.eye(3)[None])


def test_channels_become_the_fourth_axis(tmp_path):
    data = np.random.default_rng(0).random((3, 4, 5, 6), dtype=np.float32)
    write_nifti(tmp_path / "a.nii.gz", Volume(data, np.eye(4)))
    assert np.array_equal(
        nib.load(tmp_path / "a.nii.gz").get_fdata(dtype=np.float32), np.moveaxis(data, 0, -1)
    )


def test_write_errors(tmp_path):
    volume = Volume(np.zeros((2, 2, 2), np.uint8), np.eye(4))
    with pytest.raises(InputError, match=r"a\.mgz: expected a name that ends in"):
        write_nifti(tmp_path / "a.mgz", volume)
    save(tmp_path / "like.nii", np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(
        InputError, match=r"like\.nii: expected the grid of the volume to write, shape \(2, 2, 2\)"
    ):
        write_nifti(tmp_path / "a.nii", volume, like=tmp_path / "like.nii")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"a\.nii: cannot be written"):
        write_nifti(tmp_path / "file" / "a.nii", volume)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_full_disk_leaves_nothing(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 40)).astype(np.uint8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(InputError, match=rf"{name}: cannot be written"):
            write_nifti(tmp_path / name, Volume(noise, np.eye(4)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.float64])
def test_finer_resampling_reads_a_ramp_exactly(dtype):
    affine = affine_of(rotation(20) @ np.diag([-1.0, 2.0, 2.0]))
    source = ramp(affine, (6, 7, 8), np.float64)
    source = np.rint(source) if dtype == np.int16 else source
    fine = resample(Volume(source.astype(dtype), affine), (0.5, 1.0, 2.0), "linear")
    assert fine.shape == (12, 14, 8)
    assert np.allclose(fine.spacing, (0.5, 1.0, 2.0))
    error = np.abs(fine.data - ramp(fine.affine, fine.shape))[1:-1, 1:-1]
    assert error.max() < (0.51 if dtype == np.int16 else 1e-3)


def test_resampling_keeps_the_field_of_view():
    volume = Volume(np.ones((8, 12, 5), np.float32), OBLIQUE)
    coarse = resample(volume, (2.0, 3.0, 2.0), "linear")
    assert coarse.shape == (4, 6, 5)
    for corner in itertools.product((-0.5, 1), repeat=3):
        outer = [
            value if value < 0 else length - 0.5 for value, length in zip(corner, volume.shape, strict=True)
        ]
        same = [
            value if value < 0 else length - 0.5 for value, length in zip(corner, coarse.shape, strict=True)
        ]
        assert np.allclose(volume.affine @ [*outer, 1], coarse.affine @ [*same, 1])


def test_coarser_resampling_averages():
    board = (np.indices((32, 32, 32)).sum(axis=0) % 2).astype(np.float32)
    coarse = resample(Volume(board, np.eye(4)), (4.0, 4.0, 4.0), "linear").data
    assert np.allclose(coarse[1:-1, 1:-1, 1:-1], 0.5, atol=0.02)


def test_nearest_neighbour_brings_no_new_labels():
    labels = np.random.default_rng(0).choice([0, 2, 4], (9, 9, 9)).astype(np.uint8)
    coarse = resample(Volume(labels, OBLIQUE), (2.5, 2.5, 2.5), "nearest")
    assert coarse.data.dtype == np.uint8
    assert set(np.unique(coarse.data)) <= {0, 2, 4}
    mask = resample(Volume(labels > 0, OBLIQUE), (2.5, 2.5, 2.5), "nearest").data
    assert np.array_equal(mask, coarse.data > 0)


def test_resampling_onto_a_turned_grid_is_a_turn():
    data = np.random.default_rng(0).random((4, 5, 6)).astype(np.float32)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0])
    lps[:2, 3] = 3, 4
    assert np.allclose(resample_to(Volume(data, np.eye(4)), (4, 5, 6), lps, "linear").data, data[::-1, ::-1])


def test_sheared_affine_resamples_by_position():
    shear = affine_of([[1.0, 0.2, 0], [0, 1.0, 0.1], [0, 0, 1.0]])
    moved = resample_to(
        Volume(ramp(np.eye(4), (20, 20, 20)), np.eye(4)),
        (4, 4, 4),
        affine_of(shear[:3, :3], (5, 5, 5)),
        "linear",
    )
    assert np.allclose(moved.data, ramp(moved.affine, (4, 4, 4)), atol=1e-3)


def test_same_grid():
    first = Volume(np.zeros((4, 4, 4)), np.eye(4))
    assert same_grid(first, Volume(np.ones((4, 4, 4)), affine_of(np.eye(3), (0, 0, 0.009))))
    assert not same_grid(first, Volume(np.ones((4, 4, 4)), affine_of(np.eye(3), (0, 0, 0.02))))
    assert not same_grid(first, Volume(np.ones((4, 4, 4)), np.diag([1.0, 1.0, 1.004, 1.0])))
    assert not same_grid(first, Volume(np.zeros((4, 4, 5)), np.eye(4)))


def test_spacing_of_an_oblique_affine():
    assert np.allclose(spacing_of(OBLIQUE), (1.0, 1.5, 2.0))


def test_voxels_that_get_far_coarser_are_refused():
    fine = Volume(np.ones((60, 4, 4), np.float32), np.diag([0.04, 1.0, 1.0, 1.0]))
    assert np.allclose(resample(fine, (2.0, 1.0, 1.0), "linear").data, 1, atol=1e-3)
    with pytest.raises(InputError, match=r"at most 50 times \(0\.04, 1\.0, 1\.0\) mm \(got \(2\.1, 1, 1\)\)"):
        resample(fine, (2.1, 1, 1), "linear")
    assert resample(fine, (2.1, 1, 1), "nearest").shape == (1, 4, 4)
