import pytest
from study_plans import run_of, study_of

from timm_ext.errors import InputError
from timm_ext.study.plan import EXTENDABLE

COMPUTED = ("train-M", "fisher", "adapt", "run", "forgetting")


def study(**changes):
    values = {"methods": ("scratch", "mode-imm", "t-imm"), "train_cases": (2, 4), "seeds": (0, 1)}
    return study_of(**{**values, "draws": (0, 1), **changes})


def test_shared_steps_appear_once_and_names_are_unique():
    names = [step.name for step in study().steps]
    cases = 4 + 1 + 2 + 4  # sources with tests, test, validation by draw, training by number and draw
    assert len(names) == len(set(names)) == cases + 2 + 2 + 8 + 3 * 8 + (1 + 4)
    assert sum(name.startswith("train-M") for name in names) == 2
    assert "run-t-imm-seed1-n4-draw0" in names


@pytest.mark.parametrize(
    "more",
    [
        {"train_cases": (2, 4, 8)},
        {"draws": (0, 1, 2)},
        {"seeds": (0, 1, 2)},
        {"methods": ("scratch", "mode-imm", "t-imm", "imm-warmup")},
    ],
)
def test_an_extended_study_keeps_its_runs(more):
    runs = {run.step for run in study().runs}
    assert runs < {*study(**more).steps}
    assert set(more) <= set(EXTENDABLE)


def test_the_layers_are_part_of_what_they_compute():
    """Of trainings and predictions, not of the cases."""
    fast, plain = study(), study(fast_layers=False)
    for made, expected in ((fast, True), (plain, False)):
        said = [step.question.get("train", step.question) for step in made.steps]
        assert {own["fast_layers"] for own in said if "fast_layers" in own} == {expected}
    again = {step.name for step in {*fast.steps} & {*plain.steps}}
    assert again == {name for step in fast.steps if not (name := step.name).startswith(COMPUTED)}


def test_draws_share_models_and_test_cases():
    runs = study().runs
    one, two = (next(r for r in runs if (r.arm, r.draw) == ("t-imm", draw)) for draw in (0, 1))
    assert one.step.needs["test"] == two.step.needs["test"] == study().tests
    assert one.adaptation.needs["model-2"] == two.adaptation.needs["model-2"] == study().models[1]
    assert one.step != two.step


def test_fractions_are_of_the_pool():
    assert study(train_cases=(), fractions=(1.0, 0.05, 0.25), pool=20).train_cases == (1, 5, 20)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fractions": (0.5,)}, r"fractions: expected pool"),
        ({"fractions": (0.01,), "pool": 9}, r"train_cases: must be at least 1 \(got 0\)"),
        ({"pool": 3}, r"train_cases: expected at most the 3 available training cases \(got 4\)"),
        ({"size": (4096,) * 3}, r"size: a batch of 2 .*: expected at most .* of memory"),
        ({"sources": ({"task": "nothing"}, {"task": "brats"})}, r"task: expected one of .*nothing"),
        ({"adapt_steps": 100}, r"adapt_steps must be less than steps 100 \(got 100\)"),
        ({"train": {"drop_transfer": 2.0}}, "drop_transfer: expected a finite number .* less than 1"),
    ],
)
def test_plans_that_cannot_be_laid_out(changes, message):
    with pytest.raises(InputError, match=message):
        study_of(**changes)


def test_runs_are_rows_by_number_of_cases_draw_arm_and_seed():
    whole = study()
    rows = [(run.train_cases, run.draw, run.arm, run.seed) for run in whole.runs]
    arms = whole.plan.methods
    assert rows == [(n, d, arm, s) for n in (2, 4) for d in (0, 1) for arm in arms for s in (0, 1)]
    assert {run.step for run in whole.runs} < {*whole.steps}
    assert [run.adaptation is not None for run in whole.runs[:6]] == [False] * 4 + [True] * 2
    assert not whole.runs[0].members
    assert len(study(methods=("soup",)).runs[0].members) == 2


def test_sources_are_those_that_runs_start_from():
    titles = [source.title for source in study().sources]
    assert titles == ["M1: parcellation-1-7", "M2: parcellation-8-14"]
    (source,) = study(methods=("scratch", "transfer-joint")).sources
    assert (source.title, source.train_cases) == ("Source of Transfer from joint training", 32)


def test_merges_are_remembered_once_and_learned_ones_by_run():
    rows = study().forgetting
    assert [row.arm for row in rows] == ["mode-imm"] + ["t-imm"] * 8
    assert (rows[0].train_cases, rows[0].draw, rows[0].seed) == (None, None, None)
    assert [(row.train_cases, row.draw, row.seed) for row in rows[1:]] == [
        (n, d, s) for n in (2, 4) for d in (0, 1) for s in (0, 1)
    ]
    assert len({(row.step.digest, row.key) for row in rows}) == 9


def test_forgetting_of_an_initialisation_is_scored_once():
    methods = ("transfer-1", "transfer-1-l2", "transfer-1-drop", "transfer-1-probe", "mode-imm-normalized")
    assert [row.arm for row in study_of(methods=methods).forgetting] == ["transfer-1", "mode-imm-normalized"]
    shared = study_of(methods=("t-imm", "t-imm-extra"), seeds=(0,))
    assert [row.arm for row in shared.forgetting] == ["t-imm"]


@pytest.mark.parametrize(
    "methods", [("transfer-1", "transfer-joint"), ("transfer-1", "soup", "t-imm-annealed")]
)
def test_only_pure_and_adapted_merges_are_scored(methods):
    assert [row.arm for row in study_of(methods=methods).forgetting] == ["transfer-1"]


def test_scratch_waits_for_no_source():
    whole = study_of()
    assert set(run_of(whole, "scratch").step.needs) == {"train", "val", "test"}
    assert "fisher-1" not in run_of(whole, "mean-imm").step.needs
    assert "fisher-1" in run_of(whole, "mode-imm").step.needs
    assert set(run_of(whole, "t-imm").step.needs) == {"train", "val", "test", "start"}


def test_a_setting_changes_only_the_steps_that_depend_on_it():
    one, other = study_of(), study_of(lr=1e-3)
    assert one.models == other.models
    assert not {run.step for run in one.runs} & {run.step for run in other.runs}
    plain, augmented = study(), study(train={"augment": False})
    assert plain.models == augmented.models
    pair = [run_of(whole, "t-imm", 0) for whole in (plain, augmented)]
    assert pair[0].adaptation == pair[1].adaptation
    assert pair[0].step != pair[1].step
