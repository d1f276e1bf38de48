"""The plan on real scans, at the size of a smoke test on made-up ones."""

import csv
import json

import numpy as np
import pytest

from timm_ext.config import load_settings
from timm_ext.data.volume import Volume, write_nifti
from timm_ext.errors import InputError
from timm_ext.study.plan import StudyPlan, bundled_plans
from timm_ext.study.run import run_study
from timm_ext.study.study import make_study

SIDES = {17: (18, 5, 10, 28, 1016, 1006, 1035, 12, 13), 53: (54, 44, 49, 60, 2016, 2006, 2035, 51, 52)}
SMALL = [
    *("train_cases=[1]", "draws=[0, 1]", "pool=3", "val_cases=2", "test_cases=2", "source_sets=2"),
    *("source_cases=2", "source_test=2", "methods=[scratch, mean-imm, t-imm]", "references=[scratch]"),
    *("options={base_filters: 2, levels: 2}", "size=[16, 16, 16]", "steps=3", "adapt_steps=1"),
    *("source_steps=2", "validate_every=2"),
]


def write(path, generator, label):
    image = generator.normal(100, 5, label.shape) + 10 * (label % 7)
    write_nifti(path, Volume(image.astype(np.int16), np.eye(4)))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Seven hippocampi whose images are only called MRI, and four heads with all that the plan asks for."""
    target, heads = (tmp_path_factory.mktemp(name) for name in ("target", "heads"))
    generator = np.random.default_rng(0)
    header = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "Anterior": 1, "Posterior": 2}}
    header |= {"numTraining": 7, "file_ending": ".nii.gz"}
    (target / "dataset.json").write_text(json.dumps(header))
    for number in range(7):
        label = np.zeros((14, 15, 13), dtype=np.uint8)
        label[4:8, 8:12, 4:9], label[4:8, 3:8, 4:9] = 1, 2
        write(target / "imagesTr" / f"h_{number}_0000.nii.gz", generator, label)
        write_nifti(target / "labelsTr" / f"h_{number}.nii.gz", Volume(label, np.eye(4)))
    for number in range(4):
        label = np.zeros((48, 24, 24), dtype=np.float32)
        for hippocampus, others in SIDES.items():
            x = 12 if hippocampus == 17 else 35
            label[x, 12, 12] = hippocampus
            for place, other in enumerate(others):
                y, z = 7 + 4 * (place // 3), 7 + 4 * (place % 3)
                label[x + 2 : x + 4, y : y + 2, z : z + 2] = other
        write(heads / f"p{number}_T1.nii.gz", generator, label)
        write_nifti(heads / f"p{number}_labels.nii.gz", Volume(label, np.eye(4)))
    return [f"target_data={target}", f"source_data={heads}"]


def plan_on(data, *more):
    return load_settings(StudyPlan, bundled_plans()["hippocampus"], [*data, *SMALL, *more])


@pytest.mark.slow
def test_all_of_it_runs(data, tmp_path):
    done = run_study(plan_on(data), tmp_path / "out", workers=1)
    with open(tmp_path / "out" / "tables" / "cases.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2 * 2 * 2 * 2  # methods, source sets, draws, cases, regions
    assert {row["source_set"] for row in rows} == {"0", "1"}
    assert [source.train_cases for source in done.study.sources] == [2] * 8
    page = done.page.read_text()
    assert "2 source sets" in page
    assert "labels in wrong places" in page


def test_people_of_the_sources_are_others_in_each_set(data):
    study = make_study(plan_on(data))
    crops = [step for step in study.steps if step.name.startswith("cases-source")]
    people = {name: set() for name in ("set0", "set1")}
    for step in crops:
        people["set1" if "set1" in step.name else "set0"] |= set(step.files)
    assert [len(found) for found in people.values()] == [2, 2]
    assert not people["set0"] & people["set1"]
    assert len(crops) == 8  # the three good sources share theirs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "test_cases=3",
            r"target.*: expected at least 8 cases for 3 training, 2 validation and 3 test cases",
        ),
        ("source_sets=3", r"heads.*: expected at least 12 cases for 2 training and 2 test cases of 3 source"),
        ("train_cases=[4]", r"train_cases: expected at most the 3 available training cases \(got 4\)"),
    ],
)
def test_too_few_cases_are_told_before_anything_is_done(change, message, data):
    with pytest.raises(InputError, match=message):
        make_study(plan_on(data, change))
