import json

import pytest
from study_plans import plan_of

from timm_ext.config import load_settings
from timm_ext.errors import InputError
from timm_ext.study.plan import StudyPlan, bundled_plans, find_plan
from timm_ext.study.study import make_study

APART = ({"task": "parcellation-1-7"}, {"task": "parcellation-8-14"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("scratch", "magic")}, r"method: expected one of scratch, .* \(got 'magic'\)"),
        ({"methods": ("scratch", "transfer-3")}, r"transfer-3: expected at least 3 sources \(got 2\)"),
        (
            {"sources": ({"task": "parcellation-1-7"},), "methods": ("soup",)},
            r"soup: expected at least 2 sources \(got 1\)",
        ),
        ({"methods": ("scratch", "scratch")}, r"methods: expected each once \(got scratch, scratch\)$"),
        ({"train_cases": (1, 1)}, r"train_cases: expected each once \(got 1, 1\)$"),
        ({"methods": ()}, r"methods: expected at least one \(got none\)$"),
        ({"seeds": ()}, r"seeds: expected at least one \(got none\)$"),
        (
            {"references": ("mean-aligned",)},
            r"references: expected some of .* \(got 'mean-aligned'\)",
        ),
        ({"train_cases": (2, 4), "fractions": (0.5,)}, r"one of them \(got 2, 4 and 0.5\)"),
        ({"train_cases": ()}, r"expected train_cases or fractions, one of them \(got none and none\)"),
        (
            {"fractions": (0.0, 0.5)},
            r"fractions\.0: expected a finite number greater than 0 and at most 1 \(got 0\.0\)",
        ),
        ({"fractions": (1.5,)}, r"fractions\.0: expected a finite number .* and at most 1 \(got 1\.5\)"),
        ({"train_cases": (0,)}, r"train_cases\.0: expected a whole number from 1 to 1000000 \(got 0\)"),
        ({"seeds": (-1,)}, r"seeds\.0: expected a whole number from 0 to 4294967295 \(got -1\)"),
        ({"seeds": tuple(range(10**5))}, r"seeds: expected at most 1000 \(got 100000\)"),
        ({"draws": (2**40,)}, r"draws\.0: expected a whole number from 0"),
        ({"data_seed": -1}, r"data_seed: expected a whole number from 0"),
        ({"size": (10**6,) * 3}, r"size: expected a whole number from 8 to 4096 \(got 1000000\)"),
        ({"size": (8, 8)}, r"size: expected three numbers of voxels \(got \(8, 8\)\)$"),
        ({"spacing": 0.0}, r"spacing: expected a finite number at least 0\.001"),
        ({"batch_size": 10**9}, r"batch_size: expected a whole number from 1 to 4096"),
        ({"source_cases": 10**12}, r"source_cases: expected a whole number from 1 to 1000000"),
        ({"steps": 10**12}, r"steps: expected a whole number from 1 to 1000000000"),
        ({"lr": float("nan")}, r"lr: expected a finite number greater than 0 \(got nan\)"),
        ({"epochs": 0}, r"epochs: expected a whole number from 1 to 1000000000 \(got 0\)"),
        (
            {"train_cases": tuple(range(1, 1001)), "seeds": tuple(range(1000))},
            r"plan: expected at most 100000 runs",
        ),
        ({"train": {"learning": 1}}, r"train: unknown field learning \(expected one of augment"),
        ({"adapt_train": {"steps": 1}}, r"adapt_train: unknown field steps"),
        ({"adapt_train": {"l2_transfer": 1}}, "adapt_train: unknown field l2_transfer"),
        ({"prepare": {"spacng": 1}}, r"prepare: unknown field spacng \(expected one of bias_field"),
        ({"prepare": {"size": [8, 8, 8]}}, r"prepare: unknown field size"),
        ({"fisher": {"label": "true"}}, r"unknown field fisher\.label \(expected one of likelihood"),
        ({"fisher": {"labels": "drawn"}}, r"fisher\.labels: expected 'sampled' or 'true' \(got 'drawn'\)"),
        ({"adapt": {"rate": 1}}, "adapt: unknown field rate"),
        ({"adapt": {"logit_lr": 1}}, "adapt: unknown field logit_lr"),
        ({"method_adapt": {"medmerge": {}}}, r"method_adapt: expected some of scratch, .* \(got 'medmerge'"),
        ({"method_adapt": {"t-imm": {"pull": 1}}}, "method_adapt: unknown field pull"),
        ({"method_adapt": {"mode-imm": {}}}, r"expected methods that learn before .* \(got mode-imm\)"),
        ({"method_merge": {"t-imm": {"seed": 1}}}, "method_merge: unknown field seed"),
        ({"method_merge": {"imm-warmup": {}}}, r"expected methods that learn ratios \(got imm-warmup\)"),
        ({"method_train": {"transfer-3": {}}}, r"method_train: expected some of scratch, .* 'transfer-3'"),
        ({"method_train": {"t-imm": {"rate": 1}}}, "method_train: unknown field rate"),
        ({"method_lr": {"transfer-3": 1e-3}}, r"method_lr: expected some of scratch, .* 'transfer-3'"),
        ({"method_lr": {"t-imm": 0}}, r"method_lr\.t-imm: expected a finite number greater than 0"),
        (
            {"source_train": {"l2_transfer": 1}, "sources": APART},
            r"source_train: expected a source that starts after another with l2_transfer",
        ),
        ({"sources": ()}, r"sources: expected at least one \(got none\)$"),
        ({"sources": ({"task": "brats", "after": 1},)}, r"an earlier source than 1 \(got 1\)"),
        ({"sources": ({"task": "brats", "name": "a"},)}, r"sources\.0: expected a task, or name and regions"),
        ({"sources": ({"regions": {"a": [1]}},)}, r"sources\.0: expected a task, or name and regions"),
        ({"sources": ({"name": "a", "regions": {"a": []}},)}, r"regions\.a: expected at least one"),
        ({"sources": ({"task": "brats", "shuffled": True},)}, r"shuffled: expected regions of one's own"),
        ({"sources": ({"task": "brats", "around": [10]},)}, r"around: expected regions of one's own"),
        (
            {"sources": ({"name": "a", "regions": {"a": [7]}, "around": [10], "mirrored": [17, 49]},)},
            r"mirrored: expected some of 10, which crops are around \(got 17\)",
        ),
        (
            {"sources": ({"name": "a", "regions": {"a": [7]}, "around": [10, 10]},)},
            r"around: expected each number once",
        ),
        ({"sources": ({"name": "a", "regions": {"a": [7]}},)}, r"the whole heads for a \(got none\)"),
        (
            {"sources": ({"name": "a", "regions": {"a": range(1, 300)}, "data": "d"},)},
            r"sources: expected at most 255 labels in all regions \(got 299\)",
        ),
        ({"source_sets": 0}, r"source_sets: expected a whole number from 1"),
    ],
)
def test_plans_that_cannot_be(changes, message):
    with pytest.raises(InputError, match=message):
        plan_of(**changes)


def test_epochs_become_steps_for_each_number_of_cases():
    plan = plan_of(train_cases=(3, 8), epochs=10, adapt_epochs=2, source_epochs=5, source_cases=7)
    assert plan.budget(3) == (20, 20, 4)
    assert plan.budget(8) == (20, 40, 8)
    assert plan_of().budget(4) == (200, 100, 20)


def test_a_plan_is_json_that_makes_the_same_plan():
    plan = plan_of(prepare={"normalise": "histogram"}, method_train={"t-imm": {"lr_patience": 3}})
    values = json.loads(json.dumps(plan.model_dump(mode="json")))
    assert StudyPlan(**values) == plan


def test_folders_are_named_by_their_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sources = ({"task": "parcellation-1-7"}, {"task": "parcellation-8-14", "data": "b"})
    plan = plan_of(source="maps", sources=sources, source_data="a", target_data="c")
    assert plan.source == str(tmp_path / "maps")
    assert [plan.data_of(number) for number in (1, 2)] == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert plan.target_data == str(tmp_path / "c")
    assert plan_of().source == "phantom"


def test_preparation_and_training_take_what_the_plan_gives():
    plan = plan_of(prepare={"normalise": "histogram"}, validate_every=20)
    assert (plan.preparation.normalise, plan.preparation.spacing, plan.preparation.size) == (
        "histogram",
        plan.spacing,
        plan.size,
    )
    assert plan.preparation.spacing_tolerance is None
    train = plan.training(10, 0.5, 3, {"keep": "last", "augment": False}, keep="best", schedule="cosine")
    assert (train.steps, train.validate_every, train.lr, train.seed) == (10, 10, 0.5, 3)
    assert (train.keep, train.augment, train.schedule, train.batch_size) == ("last", False, "cosine", 2)


def test_unknown_field_in_a_plan_file(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text("methods: [scratch]\nfractoins: [0.5]\n")
    with pytest.raises(InputError, match=r"plan\.yaml, line 2: unknown field fractoins \(expected"):
        load_settings(StudyPlan, path)
    path.write_text("methods: [scratch]\ntrain_cases: [1]\ntrain: {rate: 1}\n")
    with pytest.raises(InputError, match=r"plan\.yaml, line 3: train: unknown field rate \(expected one of"):
        load_settings(StudyPlan, path)


@pytest.mark.parametrize("name", ["smoke", "small", "paper"])
def test_bundled_plans_can_be_laid_out(name):
    study = make_study(load_settings(StudyPlan, bundled_plans()[name]))
    assert len(study.train_cases) >= 2
    assert {*study.plan.references} >= {"scratch", "imm-warmup"}  # the control of T-IMM


def test_small_plan_is_five_seeds_and_two_draws_at_4_and_8_cases():
    plan = load_settings(StudyPlan, bundled_plans()["small"])
    assert (plan.train_cases, len(plan.seeds), len(plan.draws)) == ((4, 8), 5, 2)


def test_brats_plan_asks_for_its_folders(tmp_path):
    plan = load_settings(StudyPlan, bundled_plans()["brats"], [f"target_data={tmp_path / 'BraTS'}"])
    with pytest.raises(InputError, match=r"BraTS: no such file or folder"):
        make_study(plan)


def test_a_plan_of_ones_own_is_found_by_its_path(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("methods: [scratch]\ntrain_cases: [2]\n")
    assert find_plan(str(path)) == path
    assert find_plan("smoke") == bundled_plans()["smoke"]
    with pytest.raises(InputError, match=r"expected a YAML file or one of brats, demo, .* \(got 'nothing'"):
        find_plan("nothing")


def test_what_yaml_takes_for_a_text_may_be_a_number():
    plan = plan_of(train={"l2_transfer": "1e-2"}, prepare={"spacing_tolerance": "1e-2"})
    assert plan.training(4, 0.1, 0, plan.train).l2_transfer == 0.01
    assert plan.preparation.spacing_tolerance == 0.01
