from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from timm_ext.data.noise import keyed_generator
from timm_ext.data.volume import Volume
from timm_ext.errors import InputError
from timm_ext.synthesis.label_maps import (
    CHOROID_PLEXUS,
    CSF_TISSUE,
    OTHER,
    OUTSIDE,
    VESSEL,
    classes_of,
    draw_subject,
    draw_tissue,
    label_map_files,
    phantom_tissue,
    read_label_map,
    tissues_from_codes,
)
from timm_ext.synthesis.phantom import brain_labels
from timm_ext.vocabulary.structures import FREESURFER_TO_CLASS

REAL = Path(__file__).parents[3] / "shared" / "data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the real label maps are not here")
RAS = np.diag([4.0, 4.0, 4.0, 1.0])


def save(path, codes, affine=RAS):
    kind = nib.MGHImage if path.suffix == ".mgz" else nib.Nifti1Image
    nib.save(kind(codes, affine), path)
    return path


@pytest.fixture(scope="module")
def codes():
    """A phantom as a label map, with a scalp (code 515) around it."""
    data = brain_labels(1, 4.0).data.astype(np.int32)
    rim = np.zeros_like(data)
    rim[-4:] = 515
    return np.where(data == 0, rim, data)


def test_tissues_are_classes_and_more():
    tissue = tissues_from_codes(np.array([0, 2, 42, 24, 1015, 31, 163, 62, 85, 515, 20000]))
    assert tissue.tolist() == [
        0, 9, 2, CSF_TISSUE, 2, CHOROID_PLEXUS, CHOROID_PLEXUS, VESSEL, OTHER, OUTSIDE + 15, OTHER,
    ]  # fmt: skip


def test_classes_of_tissues_are_the_classes_of_the_codes():
    codes = np.array([*FREESURFER_TO_CLASS, 0, 30, 62, 80, 85, 502, 530])
    expected = [FREESURFER_TO_CLASS.get(int(code), 0) for code in codes]
    assert classes_of(tissues_from_codes(codes)).tolist() == expected


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.mgz"])
@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_a_label_map_is_read_whatever_its_file_and_type(tmp_path, codes, name, kind):
    expected = read_label_map(save(tmp_path / "plain.nii", codes.astype(np.int16)))
    volume = read_label_map(save(tmp_path / name, codes.astype(kind)))
    assert np.array_equal(volume.data, expected.data)
    assert volume.data.dtype == np.uint8


def test_orientation_is_made_canonical(tmp_path, codes):
    plain = read_label_map(save(tmp_path / "ras.nii", codes))
    turned = np.ascontiguousarray(codes[::-1].transpose(0, 2, 1)[:, ::-1])
    affine = np.array([[-4.0, 0, 0, 9], [0, 0, 4, 7], [0, -4, 0, 5], [0, 0, 0, 1]])
    lia = read_label_map(save(tmp_path / "lia.nii", turned, affine))
    assert np.array_equal(lia.data, plain.data)
    np.testing.assert_allclose(lia.affine, plain.affine)


def test_a_label_map_is_cropped_to_the_brain_and_centred_on_it(tmp_path, codes):
    volume = read_label_map(save(tmp_path / "a.nii", np.pad(codes, 20)))
    brain = np.isin(volume.data, [*range(1, CSF_TISSUE), *range(CSF_TISSUE + 1, CHOROID_PLEXUS)])
    places = np.argwhere(brain)
    middle = volume.affine[:3, :3] @ ((places.min(0) + places.max(0)) / 2) + volume.affine[:3, 3]
    np.testing.assert_allclose(middle, 0, atol=1e-9)
    assert places.min() <= 3
    assert np.all(np.array(volume.shape) - places.max(0) <= 4)


def test_a_draw_keeps_the_anatomy_and_differs_from_the_next(tmp_path, codes):
    source = read_label_map(save(tmp_path / "a.nii", codes))
    draws = [draw_tissue(source, (40, 48, 40), 4.0, keyed_generator(seed)) for seed in (0, 0, 1)]
    assert np.array_equal(draws[0].data, draws[1].data)
    assert 0.02 < np.mean(draws[0].data != draws[2].data) < 0.3
    for tissue in (2, 9, 11, 14):
        assert np.count_nonzero(draws[0].data == tissue) == pytest.approx(
            np.count_nonzero(source.data == tissue), rel=0.25
        )
    grid = Volume(draws[0].data, draws[0].affine)
    np.testing.assert_allclose(grid.affine[:3, 3] + (np.array(grid.shape) - 1) * 2.0, 0)


def test_skull_stripping_drops_what_is_outside_and_far_csf(tmp_path, codes):
    wet = np.where((codes == 0) & (np.arange(codes.shape[0]) < 4)[:, None, None], 24, codes)
    source = read_label_map(save(tmp_path / "a.nii", wet))
    whole, stripped = (
        draw_tissue(source, (40, 48, 40), 4.0, keyed_generator(0), skull_stripped=strip)
        for strip in (False, True)
    )
    assert (whole.data == OUTSIDE + 15).any()
    assert stripped.data.max() < OUTSIDE
    brain = (whole.data > 0) & (whole.data < OUTSIDE) & (whole.data != CSF_TISSUE)
    assert np.array_equal(stripped.data[brain], whole.data[brain])
    assert np.count_nonzero(stripped.data == CSF_TISSUE) < np.count_nonzero(whole.data == CSF_TISSUE)


def test_the_phantom_is_cropped_or_padded_about_its_centre():
    small, large = phantom_tissue(3, (16, 20, 16), 4.0), phantom_tissue(3, (60, 60, 60), 4.0)
    assert np.array_equal(small.data, large.data[22:38, 20:40, 22:38])
    for volume in (small, large):
        np.testing.assert_allclose(volume.affine[:3, 3] + (np.array(volume.shape) - 1) * 2.0, 0)
    assert draw_subject("phantom", 3, (16, 20, 16), 4.0, seed=9).data.tolist() == small.data.tolist()


def test_an_empty_or_missing_folder_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no map")
    with pytest.raises(InputError, match=r"expected label maps .*got none"):
        label_map_files(tmp_path)
    with pytest.raises(InputError, match="got no such folder"):
        label_map_files(tmp_path / "nowhere")


def test_two_maps_of_one_name_are_refused(tmp_path):
    for name in ("a.nii", "a.mgz"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match="expected one label map per name"):
        label_map_files(tmp_path)


def test_a_map_without_known_labels_is_refused(tmp_path):
    path = save(tmp_path / "a.nii", np.full((4, 4, 4), 515, dtype=np.int16))
    with pytest.raises(InputError, match=r"a\.nii: expected FreeSurfer labels .*515"):
        read_label_map(path)


def test_four_axes_and_truncation_are_refused(tmp_path, codes):
    with pytest.raises(InputError, match="expected a volume with 3 axes"):
        read_label_map(save(tmp_path / "a.nii", np.ones((4, 4, 4, 2), dtype=np.int16)))
    path = save(tmp_path / "b.nii.gz", codes)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match="truncated or corrupt"):
        read_label_map(path)


def test_an_unknown_subject_is_refused(tmp_path, codes):
    save(tmp_path / "a.nii", codes)
    with pytest.raises(InputError, match=r"expected a label map out of a \(got b\)"):
        draw_subject(tmp_path, "b", (8, 8, 8), 8.0, seed=0)


@needs_real
def test_real_label_maps_hold_all_classes():
    tissue = draw_subject(REAL / "label_maps", "sub-02", (40, 48, 40), 4.0, seed=0)
    assert set(np.unique(classes_of(tissue.data))) == set(range(15))
    brain = (tissue.data > 0) & (tissue.data != CSF_TISSUE)
    assert 900 < np.count_nonzero(brain) * 0.064 < 1700


@needs_real
def test_a_freesurfer_aseg_is_a_label_map_too():
    assert "aseg" in label_map_files(REAL / "real_t1")
    assert set(np.unique(classes_of(read_label_map(REAL / "real_t1" / "aseg.mgz").data))) == set(range(15))
