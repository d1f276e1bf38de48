import json

import nibabel as nib
import numpy as np
import pytest
import torch

from timm_ext.data.augment import AugmentSettings
from timm_ext.data.dataset import CaseDataset, collate
from timm_ext.data.formats.cases import Case
from timm_ext.data.prepare import PrepareSettings, prepare_cases
from timm_ext.data.tasks import task_from_dict
from timm_ext.errors import InputError
from timm_ext.training.examples import BatchOrder, training_batches
from timm_ext.training.settings import TrainSettings

TASK = task_from_dict({"name": "pair", "modalities": ["T1"], "regions": {"both": [1, 2], "core": [1]}})
SHAPE = (12, 10, 8)


def make(folder, *, shapes=(SHAPE, SHAPE), cached=True, labelled=True):
    """Cases whose intensities are all different, with one voxel of label 1 inside a block of label 2."""
    cases = []
    for number, shape in enumerate(shapes):
        image = np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape) + 10_000 * number
        label = np.zeros(shape, np.uint8)
        label[1:4, 1:4, 1:4] = 2
        label[2, 2, 2] = 1
        for name, array in (("t1", image), ("seg", label)):
            nib.save(nib.Nifti1Image(array, np.eye(4)), folder / f"c{number}_{name}.nii")
        cases.append(
            Case(
                f"c{number}",
                {"T1": folder / f"c{number}_t1.nii"},
                folder / f"c{number}_seg.nii" if labelled else None,
            )
        )
    settings = PrepareSettings(normalise="none", crop=False)
    return prepare_cases(cases, TASK, settings, folder / "cache" if cached else None, progress=False)


def equal(first, second):
    return (
        all(torch.equal(first[key], second[key]) for key in ("image", "target"))
        and first["id"] == second["id"]
    )


@pytest.mark.parametrize("in_memory", [False, True])
def test_whole_volumes(tmp_path, in_memory):
    prepared = make(tmp_path)
    data = CaseDataset(prepared, TASK, in_memory=in_memory)
    assert len(data) == 2
    for index, case in enumerate(prepared):
        sample = data[index]
        assert sample["id"] == case.id
        assert sample["image"].dtype == sample["target"].dtype == torch.float32
        assert np.array_equal(sample["image"].numpy(), case.image)
        assert np.array_equal(sample["target"].numpy(), TASK.targets(case.label))
    assert sample["target"].sum(dim=(1, 2, 3)).tolist() == [27, 1]


def test_samples_do_not_share_memory_with_the_cases(tmp_path):
    data = CaseDataset(make(tmp_path, cached=False), TASK)
    data[0]["image"].zero_()
    assert data[0]["image"].all()


def test_a_sample_is_a_function_of_seed_epoch_and_index(tmp_path):
    prepared = make(tmp_path)
    options = {"patch": (6, 6, 6), "samples_per_case": 3, "augment": AugmentSettings(affine=1, intensity=1)}
    first, again, other = (CaseDataset(prepared, TASK, seed=seed, **options) for seed in (1, 1, 2))
    assert len(first) == 6
    assert [first[index]["id"] for index in range(6)] == ["c0#1", "c0#2", "c0#3", "c1#1", "c1#2", "c1#3"]
    backwards = {index: again[index] for index in reversed(range(6))}
    assert all(equal(first[index], backwards[index]) for index in range(6))
    assert not equal(first[0], other[0])
    assert not equal(first[0], first[1])
    assert not equal(first.sample(0, epoch=0), first.sample(0, epoch=1))
    assert equal(first[0], again.sample(0, epoch=0))


def test_samples_depend_neither_on_workers_nor_on_where_a_run_goes_on(tmp_path):
    data = CaseDataset(make(tmp_path), TASK, patch=(4, 4, 4), augment=AugmentSettings(affine=1, intensity=1))
    settings = TrainSettings(steps=4, batch_size=2)

    def batches(first, workers):
        return list(training_batches(data, BatchOrder(len(data), settings, range(first, 4)), workers))

    whole = batches(0, 0)
    for first, workers in ((0, 2), (2, 0), (2, 2)):
        for batch, other in zip(whole[first:], batches(first, workers), strict=True):
            assert batch["id"] == other["id"]
            assert batch["image"].shape == (2, 1, 4, 4, 4)
            assert batch["target"].shape == (2, 2, 4, 4, 4)
            assert torch.equal(batch["image"], other["image"])
            assert torch.equal(batch["target"], other["target"])
    assert not torch.equal(whole[0]["image"].sort(0)[0], whole[1]["image"].sort(0)[0])


def test_foreground_patches_hold_every_region_in_turn(tmp_path):
    data = CaseDataset(make(tmp_path), TASK, patch=(3, 3, 3), foreground=1.0, samples_per_case=40)
    sums = torch.stack([data[index]["target"].sum(dim=(1, 2, 3)) for index in range(80)])
    assert (sums[:, 0] > 0).all()
    on_core = sum(
        torch.equal(data[index]["target"].sum(dim=(1, 2, 3)), torch.tensor([27.0, 1.0]))
        for index in range(80)
    )
    assert on_core >= 25  # half of the draws are for the core's only voxel, which centres the block


def test_background_patches_lie_anywhere_inside(tmp_path):
    data = CaseDataset(make(tmp_path), TASK, patch=(4, 4, 4), foreground=0.0, samples_per_case=100)
    firsts = set()
    for index in range(100):
        image = data[index]["image"][0]
        assert image.all()  # every voxel of the volume is non-zero: the patch lies inside
        place = np.unravel_index(int(image[0, 0, 0]) - 1, SHAPE)
        assert np.array_equal(image.numpy()[-1, -1, -1], np.ravel_multi_index(np.add(place, 3), SHAPE) + 1)
        firsts.add(place)
    assert [max(axis) for axis in zip(*firsts, strict=True)] == [8, 6, 4]
    assert [min(axis) for axis in zip(*firsts, strict=True)] == [0, 0, 0]


@pytest.mark.parametrize("foreground", [0.0, 1.0])
def test_a_patch_larger_than_the_volume_is_padded_evenly(tmp_path, foreground):
    prepared = make(tmp_path)
    sample = CaseDataset(prepared, TASK, patch=(16, 10, 9), foreground=foreground)[0]
    assert sample["image"].shape == (1, 16, 10, 9)
    assert np.array_equal(sample["image"].numpy()[:, 2:14, :, 1:9], prepared[0].image)
    assert (sample["image"] != 0).sum() == np.prod(SHAPE)
    assert sample["target"].sum(dim=(1, 2, 3)).tolist() == [27, 1]


def test_a_region_that_is_absent_is_not_sought(tmp_path):
    prepared = make(tmp_path)
    other = task_from_dict({"name": "x", "modalities": ["T1"], "regions": {"c": [7]}, "labels": [0, 1, 2, 7]})
    assert CaseDataset(prepared, other, patch=(4, 4, 4), foreground=1.0)[0]["target"].sum() == 0


def test_batches_of_different_shapes(tmp_path):
    data = CaseDataset(make(tmp_path, shapes=(SHAPE, (9, 9, 9))), TASK)
    with pytest.raises(
        InputError, match=r"samples of one shape.*\(got c0 \(1, 12, 10, 8\), c1 \(1, 9, 9, 9\)\)"
    ):
        collate([data[0], data[1]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": (4, 4)}, r"patch: must be three numbers of voxels ≥ 1 \(got \(4, 4\)\)"),
        ({"patch": (4, 4, 0)}, "patch: must be"),
        ({"samples_per_case": 0}, "samples_per_case and foreground"),
        ({"foreground": 1.1}, "samples_per_case and foreground"),
    ],
)
def test_option_errors(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        CaseDataset(make(tmp_path), TASK, **options)


def test_cases_without_labels_and_no_cases(tmp_path):
    with pytest.raises(InputError, match=r"expected a label for every case \(got none for c0, c1\)"):
        CaseDataset(make(tmp_path, labelled=False), TASK)
    with pytest.raises(InputError, match="expected at least one case"):
        CaseDataset([], TASK)
    with pytest.raises(IndexError, match="sample 2 of 2"):
        CaseDataset(make(tmp_path), TASK)[2]


def test_identity_is_of_the_content_and_not_of_the_place(tmp_path):
    (tmp_path / "a").mkdir()
    prepared = make(tmp_path / "a")
    here = CaseDataset(prepared, TASK, in_memory=True).identity()
    (tmp_path / "a").rename(tmp_path / "moved")
    (tmp_path / "b").mkdir()
    assert CaseDataset(make(tmp_path / "b", cached=False), TASK).identity() == here
    assert json.loads(json.dumps(here)) == here
    assert [name for name, _ in here["cases"]] == ["c0", "c1"]
    swapped = CaseDataset(make(tmp_path / "b")[::-1], TASK)
    assert swapped.identity()["cases"] == here["cases"][::-1]
    for other in (
        CaseDataset(make(tmp_path / "b", shapes=(SHAPE, (12, 10, 9))), TASK),
        CaseDataset(make(tmp_path / "b"), TASK, patch=(4, 4, 4)),
        CaseDataset(make(tmp_path / "b"), TASK, augment=AugmentSettings()),
        CaseDataset(make(tmp_path / "b"), TASK, seed=1),
    ):
        assert other.identity() != here


def test_identity_sees_one_changed_label(tmp_path):
    first = CaseDataset(make(tmp_path), TASK).identity()
    path = tmp_path / "c1_seg.nii"
    label = np.asarray(nib.load(path).dataobj).copy()
    label[3, 3, 3] = 1
    nib.save(nib.Nifti1Image(label, np.eye(4)), path)
    case = Case("c1", {"T1": tmp_path / "c1_t1.nii"}, path)
    settings = PrepareSettings(normalise="none", crop=False)
    changed = prepare_cases([case], TASK, settings, None, progress=False)
    [[_, digest]] = CaseDataset(changed, TASK).identity()["cases"]
    assert digest != first["cases"][1][1]
