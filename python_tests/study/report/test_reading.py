from timm_ext.data.tasks import get_task, task_from_dict
from timm_ext.study.report.reading import label_names


def test_labels_are_told_by_the_numbers_of_the_data():
    brats = {1: "necrotic core", 2: "oedema", 4: "enhancing tumour"}
    assert label_names(get_task("brats"), ()) == label_names(get_task("brats"), [0, 4]) == brats
    assert label_names(get_task("brats"), [1, 3]).keys() == {1, 2, 3}
    other = {"name": "brats of ours", "modalities": ["T1"], "regions": {"oedema": [1], "core": [2, 3]}}
    assert label_names(task_from_dict(other), [1, 2]) == {1: "oedema", 2: "2", 3: "3"}
