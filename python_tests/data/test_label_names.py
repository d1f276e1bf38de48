import pytest

from timm_ext.data.label_names import check_label_names
from timm_ext.data.tasks import TASKS, task_from_dict
from timm_ext.errors import InputError
from timm_ext.vocabulary.regions import meaning_of

BRATS, PARCELLATION = TASKS["brats"], TASKS["parcellation"]


def names(**numbers):
    """Label numbers by name, `_` for a blank."""
    listed = {name.replace("_", " "): n for name, n in numbers.items()}
    return {
        name: tuple(n) if isinstance(n, list) else (n,) for name, n in {"background": 0, **listed}.items()
    }


@pytest.mark.parametrize(
    "same",
    [
        ["edema", "oedema", "ED", "peritumoral edema", "SNFH", "Peritumoral edematous/invaded tissue",
         "surrounding non-enhancing FLAIR hyperintensity"],
        ["necrosis", "NCR", "NCR/NET", "necrotic core", "non-enhancing tumor",
         "Non-Enhancing Tumour Core", "NETC", "necrotic and non-enhancing tumor core"],
        ["enhancing tumor", "ET", "GD-enhancing tumour", "enhancing", "contrast_enhancing", "AT"],
        ["whole tumor", "WT", "Whole Tumour", "complete tumor"],
        ["tumor core", "TC", "tumour_core"],
        ["hippocampus", "Hippocampi"],
        ["cerebellum grey matter", "Cerebellar Cortex", "cerebellum-gray-matter"],
        ["brainstem", "Brain-Stem"],
        ["left thalamus", "Left-Thalamus-Proper", "lh-thalamus"],
    ],
)  # fmt: skip
def test_names_of_one_meaning(same):
    meanings = {meaning_of(name) for name in same}
    assert len(meanings) == 1
    assert meanings != {frozenset()}


@pytest.mark.parametrize("name", ["anterior", "lesion", "tumor", "liver", "WMH", "label 1", "ctx-lh-cuneus"])
def test_names_that_nobody_knows(name):
    assert meaning_of(name) == frozenset()


@pytest.mark.parametrize(
    "fitting",
    [
        names(NCR=1, ED=2, ET=3),
        names(necrosis=1, oedema=2, enhancing_tumour=4),
        names(tumor_core=1, whole_tumor=2, ET=4),
        names(whole_tumor=[1, 2, 3], tumor_core=[1, 3], enhancing_tumor=[3]),
        names(WT=[1, 2, 4], TC=[1, 4], ET=4),
        names(one=1, two=2, three=3),
        names(lesion=1),
        {},
    ],
)
def test_brats_numbering_of_the_task(fitting):
    check_label_names(fitting, BRATS, "dataset.json")


@pytest.mark.parametrize(
    ("clashing", "told"),
    [
        (names(edema=1, necrosis=2, enhancing_tumor=3),
         r"label 1 is called 'edema' there, .* for WT, TC \(and 1"),
        (names(background2=0, edema=1), "label 1 is called 'edema'"),
        (names(ncr=2), "label 2 is called 'ncr' there, but task brats takes it for WT"),
        ({"non-enhancing tumor": (2,), "x": (1,)}, "label 2 is called 'non-enhancing tumor'"),
        (names(necrosis=1, edema=2, NET=3, ET=4), "label 3 is called 'NET' .* takes it for WT, TC, ET"),
        (names(NETC=1, SNFH=2, ET=3, resection_cavity=4),
         "label 4 is called 'resection cavity' .* WT, TC, ET"),
        (names(enhancing=1), "label 1 is called 'enhancing'"),
        (names(necrosis_and_edema=1, ET=4), "label 1 is called 'necrosis and edema'"),
        (names(thalamus=3), "label 3 is called 'thalamus'"),
        (names(whole_tumor=[1, 2, 3], tumor_core=[2, 3], enhancing_tumor=[3]),
         "labels 2, 3 are called 'tumor core' there, but task brats expects in TC the labels 1, 3, 4"),
    ],
)  # fmt: skip
def test_brats_in_another_numbering(clashing, told):
    with pytest.raises(InputError, match=f"dataset.json: {told}"):
        check_label_names(clashing, BRATS, "dataset.json")


def test_structures_by_class_or_freesurfer_number():
    check_label_names(names(thalamus=3, hippocampus=10), PARCELLATION, "x")
    check_label_names(
        {"Left-Thalamus": (10,), "Right-Hippocampus": (53,), "Right-Cortex": (42,), "unknown": (80,)},
        PARCELLATION,
        "x",
    )
    check_label_names(names(hippocampus=10), TASKS["parcellation-1-7"], "x")
    for task in (PARCELLATION, TASKS["parcellation-1-7"]):
        with pytest.raises(InputError, match=r"label 3 is called 'hippocampus' there.*takes it for thalamus"):
            check_label_names(names(hippocampus=3), task, "x")
    with pytest.raises(InputError, match="takes it for amygdala"):
        check_label_names(names(putamen=4), PARCELLATION, "x")


def test_names_of_a_task_of_ones_own():
    organs = task_from_dict(
        {"name": "organs", "modalities": ["CT"], "regions": {"liver": [1, 2], "tumour": [2]}}
    )
    for fitting in (names(liver=1, tumor=2), names(liver=[1, 2], Tumour=2), names(spleen=1, cancer=2)):
        check_label_names(fitting, organs, "x")
    for clashing in (names(liver=2, tumour=1), names(tumor=1), names(liver=[1], tumour=[1, 2])):
        with pytest.raises(InputError, match=r"is called|are called"):
            check_label_names(clashing, organs, "x")


def test_sides_are_told_apart():
    sides = task_from_dict(
        {"name": "s", "modalities": ["T1"], "regions": {"left hippocampus": [1], "right hippocampus": [2]}}
    )
    check_label_names({"lh-hippocampus": (1,), "Right Hippocampus": (2,)}, sides, "x")
    with pytest.raises(InputError, match="label 1 is called 'right hippocampus'"):
        check_label_names(names(right_hippocampus=1), sides, "x")


@pytest.mark.parametrize(
    ("clashing", "told"),
    [
        ({"Left-Cerebral-White-Matter": 2, "Left-Cerebral-Cortex": 3, "Left-Thalamus": 10},
         r"label 2 is called .* takes it for cerebral grey matter .*known by label 41 or 42"),
        ({"Left-Thalamus": 10, "Left-Hippocampus": 17}, "label 10 is called 'Left-Thalamus'"),
        ({"hippocampus": 1}, "label 1 is called 'hippocampus' there"),
        ({"hippocampus": 99, "Right-White-Matter": 41}, "label 99 is called 'hippocampus' there"),
        ({"thalamus": 3, "Right-White-Matter": 41}, "label 3 is called 'thalamus' there"),
    ],
)  # fmt: skip
def test_names_are_read_in_the_numbering_of_the_files(clashing, told):
    with pytest.raises(InputError, match=told):
        check_label_names(names(**clashing), PARCELLATION, "x")


KIDNEYS = task_from_dict(
    {"name": "k", "modalities": ["CT"], "regions": {"kidney_left": [1], "kidney_right": [2], "Spleen": [3]}}
)


@pytest.mark.parametrize(
    "clashing",
    [
        {"right kidney": 1, "left kidney": 2},
        {"KidneyRight": 1, "KidneyLeft": 2},
        {"Kidney-R": 1},
        {"r. kidneys": 1},
        {"Spleens": 1},
        {"spleen": 0, "kidney left": 1},
        {"background": 1},
    ],
)
def test_words_are_compared_in_any_order_and_spelling(clashing):
    with pytest.raises(InputError, match="called"):
        check_label_names({name: (number,) for name, number in clashing.items()}, KIDNEYS, "x")


def test_words_in_another_order_fit_their_region():
    fitting = {"background": 0, "LeftKidney": 1, "kidneys (R)": 2, "SPLEEN": 3, "liver": 4}
    check_label_names({name: (number,) for name, number in fitting.items()}, KIDNEYS, "x")


@pytest.mark.parametrize(
    "clashing",
    [{"tumor": 1}, {"Tumour": 2}, {"tumor": [1, 2], "ET": 3}, {"Ödem": 1}, {"Nekrose": 2}, {"edema": 0}],
)
def test_a_tumour_has_several_tissues(clashing):
    check_label_names(names(tumor=[1, 2, 3], ET=3), BRATS, "x")
    with pytest.raises(InputError, match="called"):
        check_label_names(names(**clashing), BRATS, "x")
