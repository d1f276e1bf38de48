import shutil

import nibabel as nib
import numpy as np
import pytest
from study_plans import context

from timm_ext.data.formats.cases import read_cases
from timm_ext.data.prepare import PrepareSettings
from timm_ext.data.tasks import get_task
from timm_ext.errors import InputError
from timm_ext.study.steps.data import PreparePool, TakeCases
from timm_ext.study.steps.network_step import NetworkStep
from timm_ext.synthesis.generate import GenerateSettings, generate_cases

KINDS = {"T1": "t1", "T1c": "t1ce", "T2": "t2", "FLAIR": "flair", "label": "seg"}


@pytest.fixture(scope="module")
def brats(tmp_path_factory):
    """A folder as BraTS has it."""
    raw, folder = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("BraTS")
    generate_cases(raw, GenerateSettings(spacing=8.0, size=(20, 24, 20)), 3)
    for file in raw.rglob("*.nii.gz"):
        case, kind = file.name.removesuffix(".nii.gz").rsplit("_", 1)
        (folder / case).mkdir(exist_ok=True)
        shutil.copy(file, folder / case / f"{case}_{KINDS[kind]}.nii.gz")
    return folder


PREPARE = PrepareSettings(spacing=8.0, size=(16, 24, 16))


def pool(brats, files):
    return PreparePool(name="pool", data=str(brats), task="brats", prepare=PREPARE, files=files)


def take(brats, *cases):
    return TakeCases(name="part", data=str(brats), task="brats", cases=cases)


def test_a_pool_is_prepared_once_for_all_that_take_from_it(brats, tmp_path):
    files = {f"case-{i:03d}": {} for i in range(3)}
    assert pool(brats, files).run({}, context(tmp_path / "pool")) == {"cases": 3}
    prepared = sorted(path.name for path in (tmp_path / "pool" / "prepared").iterdir())
    assert len(prepared) == 3
    wanted = take(brats, "case-002", "case-000")
    for _ in range(2):  # a second attempt finds what the first left
        outcome = wanted.run({"pool": tmp_path / "pool"}, context(tmp_path / "part"))
    assert outcome == {"cases": ["case-000", "case-002"]}
    cases = read_cases(tmp_path / "part" / "cases", get_task("brats"), require_labels=True)
    assert [case.id for case in cases] == ["case-000", "case-002"]
    assert sorted(path.name for path in (tmp_path / "part" / "prepared").iterdir()) == prepared


def test_a_part_has_the_label_numbers_of_its_data_set(brats, tmp_path):
    """Though only cases that are not taken say that the enhancing tumour is 3."""
    shutil.copytree(brats, tmp_path / "BraTS")
    for path in (tmp_path / "BraTS").rglob("*_seg.nii.gz"):
        image = nib.load(path)
        label = np.asanyarray(image.dataobj).copy()
        label[label == 4] = 3 if "case-001" in str(path) else 1
        nib.save(nib.Nifti1Image(label, image.affine), path)
    files = {f"case-{i:03d}": {} for i in range(3)}
    pool(tmp_path / "BraTS", files).run({}, context(tmp_path / "pool"))
    take(tmp_path / "BraTS", "case-000").run({"pool": tmp_path / "pool"}, context(tmp_path / "part"))
    step = NetworkStep(name="run", task="brats", prepare=PREPARE)
    assert step.settled_task({"train": tmp_path / "part"}).labels == {0, 1, 2, 3}
    assert step.settled_task({}).labels == {0, 1, 2, 3, 4}


def test_a_data_set_that_has_changed_is_refused(brats, tmp_path):
    step = pool(brats, {"case-000": {}, "case-001": {}, "other": {}})
    with pytest.raises(InputError, match=r"expected the cases of the plan \(changed: case-002, other\)"):
        step.run({}, context(tmp_path / "pool"))
