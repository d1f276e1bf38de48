import dataclasses

import pytest

from timm_ext.config import load_settings
from timm_ext.errors import InputError
from timm_ext.study.run import bundled_plans
from timm_ext.study.settings import EXTENDABLE, CommonSettings, StudySettings, settings_to_dict
from timm_ext.study.study import make_study


def settings(**changes):
    values = {
        "methods": ("scratch", "mode-imm", "t-imm"),
        "train_cases": (2, 4),
        "seeds": (0, 1),
        "draws": (0, 1),
    }
    return StudySettings(**{**values, **changes})


def digests(study):
    return {step.digest for step in study.steps}


def test_shared_stages_appear_once_and_names_are_unique():
    study = make_study(settings())
    names = [step.name for step in study.steps]
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
    runs = {s.digest for s in make_study(settings()).steps if s.name.startswith("run-")}
    assert runs < digests(make_study(settings(**more)))
    assert set(more) <= set(EXTENDABLE)


def test_draws_share_models_and_test_cases():
    study = make_study(settings())
    one, two = study.plans[4, 0], study.plans[4, 1]
    assert [step.digest for step in one.models] == [step.digest for step in two.models]
    assert one.cases["test"].digest == two.cases["test"].digest
    assert one.runs["scratch", 0].digest != two.runs["scratch", 0].digest


def test_fractions_are_of_the_pool():
    study = make_study(settings(train_cases=(), fractions=(1.0, 0.05, 0.25), pool=20))
    assert study.train_cases == (1, 5, 20)


def test_epochs_become_steps_for_each_number_of_cases():
    study = make_study(
        settings(train_cases=(3, 8), epochs=10, adapt_epochs=2, source_epochs=5, source_cases=7)
    )
    few, many = study.plans[3, 0].settings, study.plans[8, 0].settings
    assert (few.steps, few.adapt_steps, many.steps, many.adapt_steps) == (20, 4, 40, 8)
    assert few.source_steps == many.source_steps == 20


def test_independent_sources_start_from_their_own_seed():
    chained, apart = (make_study(settings(chain=chain)).plans[2, 0].models for chain in (True, False))
    assert "parent" in chained[1].needs
    assert "parent" not in apart[1].needs
    assert chained[0].digest == apart[0].digest


def test_further_training_settings_reach_their_stage_alone():
    plain, other = make_study(settings()), make_study(settings(train={"augment": True}))
    one, two = plain.plans[2, 0], other.plans[2, 0]
    assert two.runs["scratch", 0].settings["train"]["augment"]
    assert one.models[0].digest == two.models[0].digest
    assert one.adaptations["t-imm", 0].digest == two.adaptations["t-imm", 0].digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("scratch", "magic")}, r"method: expected one of scratch, .* \(got 'magic'\)"),
        ({"methods": ("scratch", "transfer-3")}, r"transfer-3: expected at least 3 source tasks \(got 2\)"),
        ({"methods": ("scratch", "scratch")}, r"methods: expected each once \(got scratch, scratch\)"),
        ({"methods": ()}, r"methods: expected at least one \(got none\)"),
        (
            {"references": ("mean-imm",)},
            r"references: expected some of scratch, mode-imm, t-imm \(got 'mean-imm'\)",
        ),
        ({"fractions": (0.5,)}, r"expected train_cases or fractions, one of them \(got 2, 4 and 0.5\)"),
        ({"train_cases": ()}, r"expected train_cases or fractions, one of them \(got none and none\)"),
        ({"train_cases": (), "fractions": (0.5,)}, r"fractions: expected pool"),
        (
            {"train_cases": (), "fractions": (0.0, 0.5), "pool": 9},
            r"fractions: must be greater than 0 and at most 1",
        ),
        ({"train_cases": (), "fractions": (1.5,), "pool": 9}, r"fractions: .* at most 1 \(got 1.5\)"),
        ({"train_cases": (), "fractions": (0.01,), "pool": 9}, r"train_cases: must be at least 1 \(got 0\)"),
        ({"train_cases": (0,)}, r"train_cases: expected a whole number from 1 to 1000000 \(got 0\)"),
        ({"pool": 3}, r"train_cases: expected at most the 3 available training cases \(got 4\)"),
        ({"seeds": (-1,)}, r"seeds: expected a whole number from 0 to 4294967295 \(got -1\)"),
        ({"seeds": tuple(range(10**5))}, r"seeds: expected at most 1000 \(got 100000\)"),
        ({"draws": (2**40,)}, r"draws: expected a whole number from 0"),
        ({"data_seed": -1}, r"data_seed: expected a whole number from 0"),
        ({"size": (10**6,) * 3}, r"size: expected a whole number from 8 to 4096 \(got 1000000\)"),
        ({"size": (4096,) * 3}, r"size: a batch of 2 .*: expected at most .* of memory"),
        ({"spacing": 0.0}, r"spacing: expected a finite number at least"),
        ({"batch_size": 10**9}, r"batch_size: expected a whole number from 1 to 4096"),
        ({"source_cases": 10**12}, r"source_cases: expected a whole number from 1 to 1000000"),
        ({"steps": 10**12}, r"steps: expected a whole number from 1 to 1000000000"),
        ({"lr": float("nan")}, r"lr: expected a finite number greater than 0"),
        (
            {"train_cases": tuple(range(1, 1001)), "seeds": tuple(range(1000))},
            r"plan: expected at most 100000 runs",
        ),
        ({"epochs": 0}, r"epochs: expected a whole number from 1 to 1000000000 \(got 0\)"),
        ({"train": {"learning": 1}}, r"train: unknown field learning \(expected one of augment"),
        ({"adapt_train": {"steps": 1}}, r"adapt_train: unknown field steps"),
        ({"adapt_steps": 100}, r"adapt_steps must be less than steps 100 \(got 100\)"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(InputError, match=message):
        make_study(settings(**changes))


def test_settings_are_json_and_hold_all_common_fields():
    values = settings_to_dict(settings())
    assert values["train_cases"] == [2, 4]
    assert {field.name for field in dataclasses.fields(CommonSettings)} < set(values)


def test_unknown_field_in_a_plan_file(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text("methods: [scratch]\nfractoins: [0.5]\n")
    with pytest.raises(InputError, match=r"plan\.yaml, line 2: unknown field fractoins \(expected"):
        load_settings(StudySettings, path)


@pytest.mark.parametrize("name", ["smoke", "small", "paper"])
def test_bundled_plans_can_be_laid_out(name):
    study = make_study(load_settings(StudySettings, bundled_plans()[name]))
    assert len(study.train_cases) >= 2
    assert set(study.settings.references) >= {"scratch", "imm-warmup"}  # the control of T-IMM


def test_small_plan_is_five_seeds_and_two_draws_at_4_and_8_cases():
    study = make_study(load_settings(StudySettings, bundled_plans()["small"]))
    assert (study.train_cases, len(study.settings.seeds), len(study.settings.draws)) == ((4, 8), 5, 2)


def test_brats_plan_asks_for_its_folders(tmp_path):
    missing = f"target_data={tmp_path / 'BraTS'}"
    plan = load_settings(StudySettings, bundled_plans()["brats"], [missing])
    with pytest.raises(InputError, match=r"BraTS: no such file or folder"):
        make_study(plan)


def test_runs_are_rows_by_number_of_cases_draw_arm_and_seed():
    study = make_study(settings())
    rows = [(run.train_cases, run.draw, run.arm, run.seed) for run in study.runs]
    arms = study.plan.methods
    assert rows == [(n, d, arm, s) for n in (2, 4) for d in (0, 1) for arm in arms for s in (0, 1)]
    assert {run.step.digest for run in study.runs} < digests(study)
    assert [run.adaptation is not None for run in study.runs[:6]] == [False] * 4 + [True] * 2
    assert not study.runs[0].members
    soup = make_study(settings(methods=("soup",), references=("soup",)))
    assert len(soup.runs[0].members) == 2


def test_sources_are_those_that_runs_start_from():
    assert [source.title for source in make_study(settings()).sources] == [
        "M1: parcellation-1-7",
        "M2: parcellation-8-14",
    ]
    joint = make_study(settings(methods=("scratch", "transfer-joint")))
    (source,) = joint.sources
    assert (source.title, source.train_cases) == ("Source of Transfer from joint training", 32)


def test_merges_are_remembered_once_and_learned_ones_by_run():
    rows = make_study(settings()).forgetting
    assert [row.arm for row in rows] == ["mode-imm"] + ["t-imm"] * 8
    assert (rows[0].train_cases, rows[0].draw, rows[0].seed) == (None, None, None)
    assert [(row.train_cases, row.draw, row.seed) for row in rows[1:]] == [
        (n, d, s) for n in (2, 4) for d in (0, 1) for s in (0, 1)
    ]
    assert len({(row.step.digest, row.key) for row in rows}) == 9
