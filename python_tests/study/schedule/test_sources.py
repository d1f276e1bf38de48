import pytest
from study_plans import plan_of, run_of, study_of

from timm_ext.errors import InputError
from timm_ext.study.schedule.sources import parents_of


def ties_of(step):
    return {name: getattr(step.train, name) for name in ("l2_transfer", "drop_transfer")}


def test_a_fisher_takes_the_batches_of_the_plan_unless_it_has_its_own():
    plain, own = study_of(batch_size=3), study_of(fisher={"batch_size": 5, "labels": "true"})
    assert [step.fisher.batch_size for step in plain.fishers] == [3, 3]
    assert [step.fisher.batch_size for step in own.fishers] == [5, 5]
    assert own.fishers[0].fisher.labels == "true"


def test_independent_sources_start_from_their_own_seed():
    tasks = [{"task": "parcellation-1-7"}, {"task": "parcellation-8-14"}]
    chained, apart = study_of().models, study_of(sources=tasks).models
    assert "parent" in chained[1].needs
    assert "parent" not in apart[1].needs
    assert chained[0] == apart[0]


def test_ties_of_source_training_begin_with_the_second():
    plain, tied = (study_of(source_train=given).models for given in ({}, {"drop_transfer": 0.5}))
    assert plain[0] == tied[0]
    assert ties_of(tied[1]) == {"l2_transfer": 0.0, "drop_transfer": 0.5}


def test_joint_training_takes_all_source_cases_and_as_many_steps():
    study = study_of(
        methods=("scratch", "transfer-1", "transfer-joint"), seeds=(0,), source_train={"drop_transfer": 0.5}
    )
    joint = study.sources[-1].step
    assert set(joint.needs) == {"train-1", "train-2", "test-1", "test-2"}
    assert len(joint.task["regions"]) == 14
    assert joint.train.steps == 2 * study.plan.source_steps
    assert joint.seed == study.plan.source_seed + 3
    assert ties_of(joint) == {"l2_transfer": 0.0, "drop_transfer": 0.0}
    needs = run_of(study, "transfer-joint").step.needs
    assert needs["model-1"] == joint
    assert "model-2" not in needs


def test_a_source_task_may_be_trained_on_all_source_cases():
    study = study_of(methods=("transfer-2", "transfer-2-all"), seeds=(0,))
    source = study.sources[-1].step
    assert list(source.task["regions"].values()) == [[number] for number in range(8, 15)]
    assert {role for role in source.needs if role.startswith("train")} == {"train-1", "train-2"}
    assert source.train.steps == 2 * study.plan.source_steps
    assert source.seed == study.models[1].seed
    assert run_of(study, "transfer-2-all").step.needs["model-1"] == source


@pytest.mark.parametrize("name", ["transfer-joint", "transfer-1-all"])
def test_joint_training_needs_cases_that_fit_all_tasks(name):
    with pytest.raises(InputError, match=r"joint task: expected tasks with the same modalities \(got parc"):
        study_of(sources=({"task": "parcellation-1-7"}, {"task": "brats-2021"}), methods=(name,))


TREE = (
    {"task": "parcellation-1-7"},
    {"task": "parcellation-8-14", "after": 1},
    {"task": "parcellation", "after": 2},
)


def test_source_sets_have_other_cases_seeds_and_orders():
    study = study_of(sources=TREE, source_sets=4, methods=("scratch", "transfer-1", "t-imm"), seeds=(0, 1))
    models = [step for step in study.steps if step.name.startswith("train-M")]
    assert len(models) == len({step.seed for step in models}) == 3 * 4
    assert len({step.needs["train"] for step in models}) == 3 * 4
    parents = [
        [
            step.needs["parent"].name if "parent" in step.needs else None
            for step in models
            if step.name == name
        ]
        for name in ("train-M1", "train-M2", "train-M3")
    ]
    assert parents == [[None], ["train-M1"], ["train-M2"]]
    orders = {tuple(sorted(parents_of(study.plan, k).items(), key=str)) for k in range(4)}
    assert len(orders) > 1
    assert all(list(parents_of(study.plan, k).values()).count(None) == 1 for k in range(4))


def test_every_run_is_repeated_with_each_source_set_by_a_seed_of_its_own():
    few, many = (
        study_of(sources=TREE, source_sets=k, methods=("scratch", "t-imm"), seeds=(0, 1)) for k in (1, 3)
    )
    assert {*few.steps} < {*many.steps}
    assert [run.source_set for run in many.runs] == [0] * 4 + [1] * 4 + [2] * 4
    assert len({run.step.recipe.seed for run in many.runs}) == 6
    assert [row.source_set for row in many.forgetting] == [0, 0, 1, 1, 2, 2]
    assert len(many.models) == 3


def test_shuffled_sources_keep_their_place(tmp_path):
    regions = {"regions": {"amygdala": [18]}, "data": str(tmp_path)}
    sources = [{"name": "a", **regions}, {"name": "b", **regions, "after": 1}]
    sources += [{"name": "bad", **regions, "shuffled": True, "after": 2}]
    plan = plan_of(sources=sources, source_sets=20)
    found = [parents_of(plan, k) for k in range(20)]
    assert found[0] == {1: None, 2: 1, 3: 2}
    assert {3: 1, 1: 2, 2: None} in found
    assert all(parents[3] in (1, 2) for parents in found)
