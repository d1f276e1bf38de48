"""BIDS: entities of names, sessions and subjects, label maps of pipelines, tables of names."""

import pytest

from timm_ext.data.formats.cases import find_cases, read_cases, split_cases, write_list
from timm_ext.data.tasks import task_from_dict
from timm_ext.errors import InputError

ONE = task_from_dict({"name": "one", "modalities": ["T1"], "regions": {"lesion": [1]}})
TWO = task_from_dict({"name": "two", "modalities": ["FLAIR", "T1"], "regions": {"lesion": [1]}})
CONTRAST = task_from_dict({"name": "three", "modalities": ["T1", "T1c"], "regions": {"lesion": [1]}})


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def scans(root, *names):
    """Touch files by their names alone, where BIDS has them."""
    for name in names:
        parts = [part for part in name.split("_") if part.startswith(("sub-", "ses-"))]
        touch(root, "/".join([*parts, "anat", name]))
    return root


def table(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def names_of(case):
    return {key: file.name for key, file in case.images.items()} | (
        {"label": case.label.name} if case.label else {}
    )


def test_sessions_and_modalities(tmp_path):
    scans(tmp_path, "sub-02_T1w.nii.gz", "sub-02_FLAIR.nii", "sub-02_T2w.nii.gz", "sub-02_dseg.nii.gz")
    scans(tmp_path, "sub-01_ses-b_T1w.nii.gz", "sub-01_ses-b_acq-tse_FLAIR.nii.gz")
    scans(tmp_path, "sub-01_ses-a_T1w.nii.gz", "sub-01_ses-a_FLAIR.nii.gz", "sub-01_ses-a_T1w.json")
    touch(tmp_path, "sub-02/func/sub-02_task-rest_bold.nii.gz", "code/sub-09/anat/sub-09_T1w.nii.gz")
    cases = read_cases(tmp_path, TWO)
    assert [(case.id, case.subject) for case in cases] == [
        ("sub-01_ses-a", "sub-01"),
        ("sub-01_ses-b", "sub-01"),
        ("sub-02", "sub-02"),
    ]
    assert list(cases[2].images) == ["FLAIR", "T1"]
    assert names_of(cases[1])["FLAIR"] == "sub-01_ses-b_acq-tse_FLAIR.nii.gz"
    assert [case.label is not None for case in cases] == [False, False, True]


def test_a_contrast_agent_makes_another_modality(tmp_path):
    scans(tmp_path, "sub-1_T1w.nii.gz", "sub-1_ce-gadolinium_T1w.nii.gz", "sub-1_ce-gadolinium_FLAIR.nii.gz")
    (case,) = read_cases(tmp_path, CONTRAST)
    assert names_of(case) == {"T1": "sub-1_T1w.nii.gz", "T1c": "sub-1_ce-gadolinium_T1w.nii.gz"}
    with pytest.raises(InputError, match=r"missing modality FLAIR of task two \(got FLAIRce, T1w, T1wce\)"):
        read_cases(tmp_path, TWO)


def test_label_maps_of_pipelines(tmp_path):
    scans(tmp_path, "sub-1_T1w.nii.gz", "sub-2_T1w.nii.gz")
    scans(tmp_path / "derivatives/manual", "sub-1_dseg.nii.gz", "sub-1_dseg.dlabel.nii")
    scans(tmp_path / "derivatives/prep/derivatives/deep", "sub-2_space-orig_dseg.nii.gz")
    scans(tmp_path / "derivatives/prep", "sub-2_space-MNI152_dseg.nii.gz", "sub-2_desc-preproc_T1w.nii.gz")
    first, second = read_cases(tmp_path, ONE, require_labels=True)
    assert first.label == tmp_path / "derivatives/manual/sub-1/anat/sub-1_dseg.nii.gz"
    assert names_of(second) == {"T1": "sub-2_T1w.nii.gz", "label": "sub-2_space-orig_dseg.nii.gz"}


def test_a_pipeline_lends_what_it_lacks_from_the_data_set_around_it(tmp_path):
    scans(tmp_path, "sub-1_T1w.nii.gz")
    scans(tmp_path / "derivatives/a", "sub-1_dseg.nii.gz")
    scans(tmp_path / "derivatives/b", "sub-1_space-T1w_dseg.nii.gz")
    scans(tmp_path / "derivatives/c", "sub-1_desc-preproc_T1w.nii.gz")
    with pytest.raises(InputError, match=r"expected one label file \(got .*a/sub-1.* and .*b/sub-1"):
        read_cases(tmp_path, ONE)
    for pipeline, image, label in (
        ("a", "sub-1_T1w.nii.gz", "sub-1_dseg.nii.gz"),
        ("b", "sub-1_T1w.nii.gz", "sub-1_space-T1w_dseg.nii.gz"),
    ):
        (case,) = read_cases(tmp_path / "derivatives" / pipeline, ONE)
        assert names_of(case) == {"T1": image, "label": label}
    (tmp_path / "derivatives/b/sub-1/anat/sub-1_space-T1w_dseg.nii.gz").unlink()
    (case,) = read_cases(tmp_path / "derivatives/c", ONE)
    assert names_of(case) == {"T1": "sub-1_desc-preproc_T1w.nii.gz", "label": "sub-1_dseg.nii.gz"}


def test_images_in_a_space_take_label_maps_in_it(tmp_path):
    scans(tmp_path, "sub-1_space-MNI_T1w.nii.gz", "sub-1_space-MNI_dseg.nii.gz", "sub-1_dseg.nii.gz")
    (case,) = read_cases(tmp_path, ONE)
    assert names_of(case) == {"T1": "sub-1_space-MNI_T1w.nii.gz", "label": "sub-1_space-MNI_dseg.nii.gz"}


def test_a_label_map_says_which_run_is_meant(tmp_path):
    scans(tmp_path, "sub-1_run-1_T1w.nii.gz", "sub-1_run-2_T1w.nii.gz", "sub-1_part-phase_T1w.nii.gz")
    scans(tmp_path, "sub-1_FLAIR.nii.gz")
    with pytest.raises(
        InputError, match=r"sub-1: expected one image of modality T1 \(got T1w: .*run-1.*run-2"
    ):
        read_cases(tmp_path, TWO)
    scans(tmp_path / "derivatives/manual", "sub-1_run-2_seg-lesions_dseg.nii.gz")
    (case,) = read_cases(tmp_path, TWO)
    assert names_of(case)["T1"] == "sub-1_run-2_T1w.nii.gz"
    assert names_of(case)["FLAIR"] == "sub-1_FLAIR.nii.gz"


def test_names_are_those_of_the_nearest_table(tmp_path):
    manual = tmp_path / "derivatives/manual"
    scans(tmp_path, "sub-1_T1w.nii.gz", "sub-2_T1w.nii.gz")
    scans(manual, "sub-1_seg-x_dseg.nii.gz", "sub-2_seg-x_dseg.nii.gz")
    table(tmp_path / "dseg.tsv", "index\tname\n1\thippocampus\n")
    with pytest.raises(InputError, match=r"dseg\.tsv: label 1 is called 'hippocampus'"):
        read_cases(
            tmp_path, task_from_dict({"name": "t", "modalities": ["T1"], "regions": {"amygdala": [1]}})
        )
    table(manual / "seg-y_dseg.tsv", "index\tname\n1\tno name of it\n")
    table(
        manual / "seg-x_dseg.tsv", "index\tname\tcolor\n1\tlesion\t#ff0000\n0\tbackground\tn/a\n7\tscar\t\n"
    )
    assert {case.numbers for case in read_cases(tmp_path, ONE.resolve(()))} == {(1, 7)}
    table(manual / "sub-2/anat/sub-2_seg-x_dseg.tsv", "index\tname\n1\tlesions of others\n")
    with pytest.raises(InputError, match=r"label 1 to be called 'lesion'|label 1 to be called lesion, as in"):
        read_cases(tmp_path, ONE)


@pytest.mark.parametrize("text", ["index\tname\nx\tlesion\n", "index,name\n1,lesion\n", "name\nlesion\n"])
def test_a_table_without_numbers_is_refused(tmp_path, text):
    scans(tmp_path, "sub-1_T1w.nii.gz", "sub-1_dseg.nii.gz")
    table(tmp_path / "dseg.tsv", text)
    with pytest.raises(
        InputError, match=r"dseg\.tsv, line 2: expected the columns index, a number, and name"
    ):
        read_cases(tmp_path, ONE)


def test_sessions_of_a_subject_stay_together(tmp_path):
    scans(tmp_path, *(f"sub-{n}_ses-{s}_T1w.nii.gz" for n in range(6) for s in "abc"))
    cases = read_cases(tmp_path, ONE)
    write_list(tmp_path / "list.csv", cases)
    assert read_cases(tmp_path / "list.csv", ONE) == cases
    for seed in range(3):
        parts = split_cases(cases, [0.5, 0.5], seed=seed)
        one, other = ({case.subject for case in part} for part in parts)
        assert (len(one), len(other), one & other) == (3, 3, set())


def test_participants_without_scans_are_remarks(tmp_path):
    scans(tmp_path, "sub-1_T1w.nii.gz", "sub-2_T1w.nii.gz")
    table(tmp_path / "participants.tsv", "participant_id\tage\nsub-1\t40\nsub-3\tn/a\n")
    assert find_cases(tmp_path, ONE).remarks == (
        "participants.tsv names sub-3, without any image",
        "participants.tsv does not name sub-2",
    )


def test_masks_are_named_where_a_label_map_is_missing(tmp_path):
    scans(tmp_path, "sub-1_T1w.nii.gz", "sub-1_lesion.nii.gz")
    scans(tmp_path / "derivatives/manual", "sub-1_label-lesion_mask.nii.gz")
    with pytest.raises(
        InputError, match=r"missing label; not recognised as one: .*_lesion\.nii\.gz, .*_mask\.nii\.gz"
    ):
        read_cases(tmp_path, ONE, require_labels=True)


def test_subjects_in_folders_of_brats_are_none_of_bids(tmp_path):
    touch(tmp_path, "sub-1/sub-1_t1.nii.gz", "sub-1/sub-1_seg.nii.gz", "dataset_description.json")
    (case,) = read_cases(tmp_path, ONE)
    assert (case.id, case.subject) == ("sub-1", "")
