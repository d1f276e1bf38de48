import json

import numpy as np
import pytest
from study_plans import context

from timm_ext.data.formats.cases import read_cases
from timm_ext.data.prepare import PrepareSettings
from timm_ext.data.volume import Volume, read_labels, read_volume, write_nifti
from timm_ext.errors import InputError
from timm_ext.study.source import heads as whole_heads
from timm_ext.study.steps.crops import CropHeads

SHAPE = (40, 30, 30)
CENTRES = {17: (10, 15, 15), 53: (29, 15, 15)}


def head(folder, name, *, without=()):
    """A head whose hippocampi are cubes about mirrored places; beside each, outwards, an amygdala."""
    image = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE) % 1000 + 1
    label = np.zeros(SHAPE, dtype=np.float32)
    for number, (x, y, z) in CENTRES.items():
        label[x - 1 : x + 2, y - 1 : y + 2, z - 1 : z + 2] = number
        outwards = -3 if number == 17 else 3
        label[x + outwards, y, z] = number + 1
        label[x + outwards, y, z + 1] = 1000 * (1 + (number == 53)) + 7
    label[np.isin(label, without)] = 0
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    write_nifti(folder / f"{name}_T1.nii.gz", Volume(image, affine))
    write_nifti(folder / f"{name}_label.nii.gz", Volume(label, affine))
    return {"id": name, "T1": f"{name}_T1.nii.gz", "label": f"{name}_label.nii.gz"}


def heads(folder, names=("a", "b"), **kwargs):
    folder.mkdir()
    (folder / "cases.json").write_text(json.dumps([head(folder, name, **kwargs) for name in names]))
    return str(folder)


def step(data, crops=("a-17", "a-53"), **changes):
    files = {name.rpartition("-")[0]: {} for name in crops}
    size, spacing = changes.pop("size", (10, 12, 8)), changes.pop("spacing", 1.0)
    prepare = PrepareSettings(spacing=spacing, size=size, crop=False, normalise="none")
    settings = {"modality": "T1", "around": (17, 53), "mirrored": (17,), "labels": (18, 54, 1007, 2007)}
    settings |= {"data": data, "files": files, "crops": crops, "prepare": prepare, **changes}
    return CropHeads(name="crops", **settings)


def arrays(folder):
    cases = read_cases(folder / "cases", whole_heads("T1"))
    return {case.id: (read_volume(case.images["T1"]).data, read_labels(case.label).data) for case in cases}


def test_left_crops_mirror_right_ones_and_labels_are_numbered_anew(tmp_path):
    made = step(heads(tmp_path / "heads")).run({}, context(tmp_path / "out"))
    assert made == {"cases": ["a-17", "a-53"]}
    (left_image, left), (right_image, right) = arrays(tmp_path / "out").values()
    assert left.shape == left_image.shape == right.shape == (10, 12, 8)
    assert np.argwhere(left == 1).tolist() == np.argwhere(right == 2).tolist() == [[8, 6, 4]]
    assert np.argwhere(left == 3).tolist() == np.argwhere(right == 4).tolist() == [[8, 6, 5]]
    assert set(np.unique(left)) == {0, 1, 3}  # the hippocampus itself is in no region
    whole = read_volume(tmp_path / "heads" / "a_T1.nii.gz").data
    assert (right_image == whole[24:34, 9:21, 11:19]).all()
    assert (left_image == whole[6:16, 9:21, 11:19][::-1]).all()


def test_only_the_crops_of_the_plan_are_cut(tmp_path):
    made = step(heads(tmp_path / "heads"), ("b-53",)).run({}, context(tmp_path / "out"))
    assert made == {"cases": ["b-53"]}
    (case,) = read_cases(tmp_path / "out" / "cases", whole_heads("T1"))
    assert case.id == "b-53"


def test_a_crop_beyond_the_scan_is_padded_and_coarse_voxels_cover_the_same_place(tmp_path):
    made = step(heads(tmp_path / "heads"), ("a-53",), size=(24, 12, 8), spacing=2.0)
    made.run({}, context(tmp_path / "out"))
    image, label = arrays(tmp_path / "out")["a-53"]
    assert image.shape == (48, 24, 16)
    assert (image[35:] == 0).all()
    assert np.argwhere(label == 2).tolist() == [[27, 12, 8]]


def test_shuffled_labels_are_as_many_elsewhere(tmp_path):
    data = heads(tmp_path / "heads")
    for name, seed in (("plain", None), ("shuffled", 0), ("again", 0), ("other", 1)):
        step(data, shuffle_seed=seed).run({}, context(tmp_path / name))
    plain, shuffled, again, other = (
        arrays(tmp_path / name)["a-53"][1] for name in ("plain", "shuffled", "again", "other")
    )
    assert (np.bincount(shuffled.ravel()) == np.bincount(plain.ravel())).all()
    assert not (shuffled * plain).any()
    assert (shuffled == again).all()
    assert (shuffled != other).any()


def test_a_head_without_a_hippocampus_is_refused(tmp_path):
    made = step(heads(tmp_path / "heads", without=(53,)))
    with pytest.raises(InputError, match=r"a_label.nii.gz: expected label 53, which a crop is around \(got"):
        made.run({}, context(tmp_path / "out"))


def test_heads_that_are_gone_are_told(tmp_path):
    data = heads(tmp_path / "heads")
    with pytest.raises(InputError, match=r"expected the cases of the plan \(got none of c\)"):
        step(data, ("c-17",)).run({}, context(tmp_path / "out"))


def test_crops_are_around_any_structure_and_mirrored_as_asked(tmp_path):
    data = heads(tmp_path / "heads")
    made = step(data, ("a-18", "a-54"), around=(18, 54), mirrored=(54,), labels=(17, 53))
    assert made.run({}, context(tmp_path / "out")) == {"cases": ["a-18", "a-54"]}
    (left_image, left), (right_image, right) = arrays(tmp_path / "out").values()
    whole = read_volume(tmp_path / "heads" / "a_T1.nii.gz").data
    assert (left_image == whole[2:12, 9:21, 11:19]).all()
    assert (right_image == whole[3:40, 9:21, 11:19][::-1][2:12]).all()
    assert np.argwhere(left == 1).mean(axis=0).tolist() == [8, 6, 4]
    assert np.argwhere(right == 2).mean(axis=0).tolist() == [8, 6, 4]


def test_heads_have_the_modality_of_the_plan(tmp_path):
    data = heads(tmp_path / "heads")
    listed = tmp_path / "heads" / "cases.json"
    listed.write_text(listed.read_text().replace('"T1": ', '"T2": '))
    step(data, modality="T2").run({}, context(tmp_path / "out"))
    (first, _) = read_cases(tmp_path / "out" / "cases", whole_heads("T2"))
    assert first.images["T2"].name == "a-17_T2.nii.gz"
