"""Data sets of nnU-Net and of the Medical Segmentation Decathlon, from their dataset.json to samples."""

import json

import nibabel as nib
import numpy as np
import pytest

from timm_ext.data.formats.cases import Case, read_cases, write_list
from timm_ext.data.prepare import PrepareSettings, prepare_cases, resolve_task
from timm_ext.data.tasks import TASKS, Region, get_task
from timm_ext.errors import InputError

BRATS = TASKS["brats"]
COMPANION = bytes.fromhex("0005160700020000") + b"Mac OS X        " + bytes(64)


def save(path, data):
    """Write a volume and the companion that a Mac's archive puts beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, np.eye(4)), path)
    (path.parent / f"._{path.name}").write_bytes(COMPANION)


def header(root, **content):
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(content))
    return root / "dataset.json"


def decathlon(root, cases=("BRATS_001", "BRATS_002"), ending=".nii.gz"):
    """Task01 as it is downloaded: channels in the fourth axis; 1 oedema, 2 non-enhancing, 3 enhancing."""
    rng = np.random.default_rng(0)
    label = np.zeros((8, 8, 8), np.uint8)
    label[1:7, 1:7, 1:7], label[2:6, 2:6, 2:6], label[3:5, 3:5, 3:5] = 1, 2, 3
    for number, case in enumerate(cases):
        image = 100.0 * np.arange(1, 5) + rng.normal(number, 1, (8, 8, 8, 4))
        save(root / "imagesTr" / f"{case}{ending}", image.astype(np.float32))
        save(root / "labelsTr" / f"{case}{ending}", label)
    save(root / "imagesTs" / f"BRATS_009{ending}", image.astype(np.float32))
    return header(
        root,
        name="BRATS",
        modality={"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"},
        labels={"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"},
        numTraining=len(cases),
        training=[
            {"image": f"./imagesTr/{case}{ending}", "label": f"./labelsTr/{case}{ending}"} for case in cases
        ],
        test=[f"./imagesTs/BRATS_009{ending}"],
    )


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_a_decathlon_data_set_as_downloaded(tmp_path, ending):
    task = get_task(decathlon(tmp_path, ending=ending))
    assert (task.name, task.modalities) == ("BRATS", ("FLAIR", "T1w", "t1gd", "T2w"))
    assert task.regions == (
        Region("edema", (1,)),
        Region("non-enhancing tumor", (2,)),
        Region("enhancing tumour", (3,)),
    )
    cases = read_cases(tmp_path, task, require_labels=True)
    assert [case.id for case in cases] == ["BRATS_001", "BRATS_002"]
    settings = PrepareSettings(normalise="none", crop=False)
    prepared = prepare_cases(cases, task, settings, tmp_path / "cache", progress=False)
    assert [round(float(channel.mean()), -2) for channel in prepared[1].image] == [100, 200, 300, 400]
    assert prepared[1].present == (0, 1, 2, 3)


def test_channels_of_one_file_come_in_the_order_of_the_task(tmp_path):
    decathlon(tmp_path)
    (case,) = read_cases(tmp_path / "imagesTs", BRATS)
    assert (case.id, case.label, case.channels) == (
        "BRATS_009",
        None,
        {"T1": 1, "T1c": 2, "T2": 3, "FLAIR": 0},
    )
    settings = PrepareSettings(normalise="none", crop=False)
    (prepared,) = prepare_cases([case], BRATS, settings, None, progress=False)
    assert [round(float(channel.mean()), -2) for channel in prepared.image] == [200, 300, 400, 100]


@pytest.mark.parametrize("name", ["list.csv", "list.json"])
def test_channels_of_one_file_survive_a_list(tmp_path, name):
    decathlon(tmp_path)
    cases = read_cases(tmp_path / "imagesTs", BRATS)
    write_list(tmp_path / name, cases)
    assert "imagesTs/BRATS_009.nii.gz[2]" in (tmp_path / name).read_text()
    (case,) = read_cases(tmp_path / name, BRATS)
    assert (case.images, case.channels) == (cases[0].images, cases[0].channels)


def test_a_file_without_the_channel_is_refused(tmp_path):
    decathlon(tmp_path)
    save(tmp_path / "imagesTs" / "BRATS_009.nii.gz", np.ones((4, 4, 4, 2), np.float32))
    with pytest.raises(InputError, match=r"BRATS_009.*at least 3 volumes \(got shape \(4, 4, 4, 2\)\)"):
        prepare_cases(
            read_cases(tmp_path / "imagesTs", BRATS), BRATS, PrepareSettings(), None, progress=False
        )


def test_the_decathlons_numbers_are_not_those_of_brats(tmp_path):
    path = decathlon(tmp_path)
    with pytest.raises(InputError, match=r"label 1 is called 'edema' there.*--task .*dataset\.json"):
        read_cases(tmp_path, BRATS)
    assert len(read_cases(tmp_path, BRATS, use_labels=False)) == 2  # prediction reads images alone
    with pytest.raises(InputError, match="label 1 is called 'edema'"):
        read_cases(path, BRATS, require_labels=True)


def test_nnunets_first_version_lists_names_without_their_channel(tmp_path):
    label = np.ones((4, 4, 4), np.uint8)
    for channel in (0, 1):
        save(tmp_path / "imagesTr" / f"la_001_{channel:04d}.nii.gz", label)
    save(tmp_path / "labelsTr" / "la_001.nii.gz", label)
    listed = [{"image": "./imagesTr/la_001.nii.gz", "label": "./labelsTr/la_001.nii.gz"}]
    path = header(
        tmp_path, modality={"0": "CT", "1": "PET"}, labels={"0": "background", "1": "x"}, training=listed
    )
    (case,) = read_cases(tmp_path, get_task(path))
    assert case.id == "la_001"
    assert [file.name for file in case.images.values()] == ["la_001_0000.nii.gz", "la_001_0001.nii.gz"]
    assert not case.channels


def test_files_that_are_stated_case_by_case(tmp_path):
    for name in ("one.nii.gz", "label.nii.gz"):
        save(tmp_path / "elsewhere" / name, np.ones((4, 4, 4), np.uint8))
    stated = {"a": {"images": ["elsewhere/one.nii.gz"], "label": "elsewhere/label.nii.gz"}}
    path = header(tmp_path, channel_names={"0": "T1"}, labels={"background": 0, "x": 1}, dataset=stated)
    (case,) = read_cases(tmp_path, get_task(path))
    folder = tmp_path / "elsewhere"
    assert case == Case("a", {"T1": folder / "one.nii.gz"}, folder / "label.nii.gz", numbers=(1,))
    stated["a"]["images"].append("more.nii.gz")
    header(tmp_path, channel_names={"0": "T1"}, labels={"background": 0, "x": 1}, dataset=stated)
    with pytest.raises(InputError, match=r"expected 1 images of 'a', T1 \(got 2\)"):
        read_cases(tmp_path, BRATS)


def test_a_task_with_regions_writes_the_numbers_that_are_stated(tmp_path):
    labels = {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": 3}
    channels = {"1": "T1ce", "0": "T1"}
    task = get_task(header(tmp_path, channel_names=channels, labels=labels, regions_class_order=[1, 2, 3]))
    assert task.modalities == ("T1", "T1ce")
    assert task.region_names == ("whole tumor", "tumor core", "enhancing tumor")
    assert task.paint_order() == ((0, 1), (1, 2), (2, 3))
    several = {"background": 0, "whole": [1, 2, 3], "core": [3]}
    task = get_task(header(tmp_path, channel_names=channels, labels=several, regions_class_order=[2, 3]))
    assert task.paint_order() == ((0, 2), (1, 3))
    task = get_task(header(tmp_path, channel_names=channels, labels=several, regions_class_order=[3, 1]))
    assert task.paint_order() == ((0, 3), (1, 1))
    with pytest.raises(
        InputError, match=r"class_order: expected one of the labels \[1, 2, 3\].*\(got \[3, 3\]\)"
    ):
        get_task(header(tmp_path, channel_names=channels, labels=several, regions_class_order=[3, 3]))
    with pytest.raises(InputError, match=r"a number for each of 2 regions \(got \[1\]\)"):
        get_task(header(tmp_path, channel_names=channels, labels=several, regions_class_order=[1]))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"background": 0}, r"expected a label besides the background \(got none\)"),
        ({"background": 0, "x": 1, "ignore": 2}, "cannot leave out voxels.*'ignore'"),
        ({"background": 0, "x": 300}, "regions\\.x: expected numbers in 0..255"),
        ({"background": 0, "x": [0, 1]}, "must not hold label 0"),
        (["background"], "labels: expected numbers by name"),
        ({"background": 0, "x": "1"}, "labels: expected numbers by name"),
        ({"background": 0, "x": True}, "labels: expected numbers by name"),
        ({"background": 0, "x": -1}, "labels: expected numbers by name"),
    ],
)
def test_labels_that_make_no_task(tmp_path, labels, message):
    with pytest.raises(InputError, match=message):
        get_task(header(tmp_path, channel_names={"0": "T1"}, labels=labels))


def test_labels_of_one_number_each_are_classes_of_a_softmax(tmp_path):
    labels = {"background": 0, "Anterior": 1, "Posterior": 2}
    task = get_task(header(tmp_path, channel_names={"0": "MRI"}, labels=labels))
    assert task.softmax
    assert task.output_names == ("background", "Anterior", "Posterior")
    overlapping = {"background": 0, "whole": [1, 2], "core": 2}
    task = get_task(header(tmp_path, channel_names={"0": "MRI"}, labels=overlapping))
    assert not task.softmax
    assert task.output_names == ("whole", "core")


def test_the_background_has_any_name(tmp_path):
    task = get_task(header(tmp_path, channel_names={"0": "T1"}, labels={"rest": 0, "x": 1}))
    assert task.region_names == ("x",)


@pytest.mark.parametrize("channels", [{"0": "T1", "00": "T2"}, {"0": 1}, {"²": "T1"}, {"9" * 5000: "T1"}])
def test_channels_of_another_kind(tmp_path, channels):
    with pytest.raises(InputError, match=r"dataset\.json: expected "):
        read_cases(header(tmp_path, channel_names=channels, labels={}), BRATS)


@pytest.mark.parametrize(
    "names", [["T1", "T1"], ["T1", "T1w"], ["t1n", "T1"], ["T1", "MPRAGE", "T1 weighted"]]
)
def test_two_channels_of_one_modality(tmp_path, names):
    for channel in range(len(names)):
        save(tmp_path / "imagesTs" / f"a_{channel:04d}.nii.gz", np.ones((4, 4, 4), np.uint8))
    header(tmp_path, channel_names=dict(enumerate(names)), labels={"background": 0, "x": 1})
    task = get_task("parcellation")
    with pytest.raises(InputError, match=r"one image of modality T1 .*a_0000\.nii\.gz and .*a_0001\.nii\.gz"):
        read_cases(tmp_path / "imagesTs", task)


def test_names_against_a_task_that_was_settled_on_other_numbers(tmp_path):
    save(tmp_path / "imagesTr" / "a_0000.nii.gz", np.ones((4, 4, 4), np.uint8))
    header(tmp_path, channel_names={"0": "T1"}, labels={"background": 0, "ED": 2, "ET": 3})
    with pytest.raises(InputError, match=r"label 3 is called 'ET' there.*; .*--task brats takes either"):
        read_cases(tmp_path, BRATS.resolve({4}), require_labels=True)


def test_numbers_that_are_stated_settle_the_task_though_no_file_holds_them(tmp_path):
    label = np.zeros((4, 4, 4), np.uint8)
    label[1:3] = 2
    for channel in range(4):
        save(
            tmp_path / "imagesTr" / f"a_{channel:04d}.nii.gz", np.random.default_rng(0).normal(size=(4, 4, 4))
        )
    save(tmp_path / "labelsTr" / "a.nii.gz", label)
    channels = {"0": "T1", "1": "T1-Gd", "2": "T2", "3": "T2-FLAIR"}
    header(tmp_path, channel_names=channels, labels={"background": 0, "NCR": 1, "ED": 2, "ET": 3})
    prepared = prepare_cases(read_cases(tmp_path, BRATS), BRATS, PrepareSettings(), None, progress=False)
    assert resolve_task(BRATS, prepared).paint_order()[-1] == (2, 3)
