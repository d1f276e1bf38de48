import json
import shutil

import numpy as np
import pytest
from study_plans import run_of, study_of

from timm_ext.data.tasks import get_task, task_from_dict
from timm_ext.errors import InputError
from timm_ext.files import write_json
from timm_ext.study.outcomes import PREDICTIONS, TIMES
from timm_ext.study.records import Folder
from timm_ext.study.report.reading import label_names, read_results
from timm_ext.study.step import Context

MACHINE = dict.fromkeys(("timm_ext", "torch", "python", "machine", "instruction_set"), "x")
CASES, REGIONS = ("test-000", "test-001", "test-002"), ("WT", "TC", "ET")
METHODS = ("scratch", "mode-imm", "t-imm", "t-imm-extra", "soup")


def scores(place, factor=1.0):
    return {
        case: {region: factor * (place + number / 10 + part / 100) for part, region in enumerate(REGIONS)}
        for number, case in enumerate(CASES)
    }


def outcome(name, place):
    """What the step at a place of the study might have found."""
    if name.startswith("forgetting"):
        return {"dice": {key: {"task": place / 100} for key in ("mode-imm", "t-imm-seed0")}}
    steps = 4 if name.startswith("adapt") else 10
    trained = {"curve": [[2, 0.1], [steps, 0.3]], "steps": steps, "best_step": 2}
    if name.startswith("adapt"):
        trained |= {"ratios": [[0.25, 0.75], [place, 1]], "layers": ["a", "b"], "sources": ["M1", "M2"]}
    return {**trained, "scores": scores(place), "hd95": scores(place, 10.0)}


@pytest.fixture(scope="module")
def study():
    tiny = {"spacing": 8.0, "size": (20, 24, 20), "test_cases": 3, "batch_size": 2}
    return study_of(**tiny, methods=METHODS, train_cases=(2, 4), draws=(0, 1), seeds=(0,))


@pytest.fixture
def folder(study, tests, tmp_path):
    """A finished study: its test cases are real, its trainings made up."""
    folder = Folder(tmp_path)
    shutil.copytree(tests, folder.run_path(study.tests))
    for place, step in enumerate(study.steps):
        path = folder.run_path(step)
        for label in tests.rglob("*_label.nii.gz"):
            path.joinpath(PREDICTIONS).mkdir(parents=True, exist_ok=True)
            shutil.copy(label, path / PREDICTIONS / label.name.replace("_label", ""))
        write_json(path / TIMES, {"seconds": 20.0, "validations": [[2, 5.0]]})
        folder.write_record(step, outcome(step.name, place), seconds=21.0)
    return folder


@pytest.fixture(scope="module")
def tests(study, tmp_path_factory):
    path = tmp_path_factory.mktemp("tests")
    assert study.tests.run({}, Context(path, lambda fraction: None))["cases"] == list(CASES)
    return path


def test_rows_go_by_number_of_cases_and_method(study, folder):
    results = read_results(study, folder, MACHINE)
    runs = results.runs[["method", "train_cases", "draw"]].values.tolist()
    assert runs == [[m, count, draw] for count in (2, 4) for m in METHODS for draw in (0, 1)]
    assert results.methods["soup"] == "Uniform soup, T trainings"
    assert results.longer == ("t-imm-extra", "soup")
    assert (results.counts, results.draws, results.regions) == ((2, 4), (0, 1), REGIONS)


def test_scores_are_those_of_the_records(study, folder):
    results = read_results(study, folder, MACHINE)
    place = study.steps.index(
        next(r for r in study.runs if (r.arm, r.train_cases, r.draw) == ("t-imm", 4, 1)).step
    )
    assert results.scores(4, "t-imm")[0, 1, 0].tolist() == [
        list(row.values()) for row in scores(place).values()
    ]
    assert results.scores(4, "t-imm", "hd95_mm")[0, 1, 0, 2, 1] == scores(place, 10.0)["test-002"]["TC"]
    assert results.diagonals.tolist() == [pytest.approx(8 * np.linalg.norm((20, 24, 20)))] * 3


def test_an_adaptation_comes_before_fine_tuning(study, folder):
    results = read_results(study, folder, MACHINE)
    curve = results.of(results.curves, 2, "t-imm").query("draw == 0")
    assert curve["step"].tolist() == [2, 4, 4 + 2, 4 + 10]
    assert curve["val_dice"].tolist() == [0.1, 0.3, 0.1, 0.3]
    assert curve["seconds"].fillna(-1).tolist() == [5.0, -1.0, 25.0, -1.0]
    lengths = results.runs.query("train_cases == 2 and draw == 0").set_index("method")
    assert lengths["steps"].to_dict() == dict(zip(METHODS, (10, 10, 14, 14, 10), strict=True))
    assert lengths["seconds"].to_dict() == dict(zip(METHODS, (21, 21, 42, 42, 63), strict=True))


def test_what_methods_share_is_told_once(study, folder):
    results = read_results(study, folder, MACHINE)
    assert set(results.ratios["method"]) == {"t-imm"}
    assert len(results.ratios) == 4 * 2 * 2
    assert results.ratios["ratio"].head(2).tolist() == [0.25, 0.75]
    stages = results.trainings[["stage", "train_cases"]].fillna(0).value_counts(sort=False)
    assert stages["M1: parcellation-1-7", 0] == 1
    assert stages["Adaptation, T-IMM", 4] == 2
    assert not any("soup" in stage or "Adaptation, T-IMM, " in stage for stage, _ in stages.index)
    forgotten = results.forgetting[["method", "train_cases", "draw"]].fillna(-1).values.tolist()
    assert forgotten == [
        ["mode-imm", -1, -1],
        *(["t-imm", count, draw] for count in (2, 4) for draw in (0, 1)),
    ]


def test_epochs_count_the_cases_of_the_stage(study, folder):
    trainings = read_results(study, folder, MACHINE).trainings.set_index("stage")
    assert trainings.loc["M1: parcellation-1-7", "epochs"] == 10 / 8  # 16 cases in batches of 2
    assert trainings.loc["Fine-tuning, From scratch", "epochs"].tolist() == [10, 10, 5, 5]
    assert trainings.loc["Fine-tuning, From scratch", "val_dice"].tolist() == [0.1] * 4  # the best is kept
    assert trainings.loc["M1: parcellation-1-7", "val_dice"] == 0.3  # the last


def test_examples_are_the_worst_the_median_and_the_best_case(study, folder):
    examples = read_results(study, folder, MACHINE).examples
    assert [example.case for example in examples] == list(CASES)
    assert list(examples[0].predictions) == ["From scratch", "Mode-IMM", "T-IMM"]
    place = study.steps.index(run_of(study, "t-imm").step)
    assert examples[2].dice["T-IMM"] == pytest.approx(place + 0.2 + 0.01)
    assert examples[0].modality == "FLAIR"
    assert examples[0].truth.shape == (24, 20)
    assert (examples[0].predictions["T-IMM"] == examples[0].truth).all()


@pytest.mark.parametrize(
    ("arm", "change", "message"),
    [
        (
            "scratch",
            lambda found: found["scores"].pop("test-001"),
            r"region \(got none of test-001",
        ),
        ("mode-imm", lambda found: found["hd95"]["test-002"].pop("ET"), r"\(got none of test-002"),
        ("t-imm", lambda found: found["ratios"].pop(), "a ratio for each layer and source"),
    ],
)
def test_a_record_that_lacks_something_is_refused(study, folder, arm, change, message):
    run = run_of(study, arm)
    step = run.adaptation or run.step
    found = json.loads(json.dumps(outcome(step.name, 1)))
    change(found)
    folder.write_record(step, found)
    with pytest.raises(InputError, match=message):
        read_results(study, folder, MACHINE)


def test_labels_are_told_by_the_numbers_of_the_data():
    brats = {1: "necrotic core", 2: "oedema", 4: "enhancing tumour"}
    assert label_names(get_task("brats"), ()) == label_names(get_task("brats"), [0, 4]) == brats
    assert label_names(get_task("brats"), [1, 3]).keys() == {1, 2, 3}
    other = {"name": "brats of ours", "modalities": ["T1"], "regions": {"oedema": [1], "core": [2, 3]}}
    assert label_names(task_from_dict(other), [1, 2]) == {1: "oedema", 2: "2", 3: "3"}
