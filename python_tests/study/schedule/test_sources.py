import pytest
from study_plans import run_of, study_of

from timm_ext.errors import InputError


def ties_of(step):
    return {name: getattr(step.train, name) for name in ("l2_transfer", "drop_transfer")}


def test_a_fisher_takes_the_batches_of_the_plan_unless_it_has_its_own():
    plain, own = study_of(batch_size=3), study_of(fisher={"batch_size": 5, "labels": "true"})
    assert [step.fisher.batch_size for step in plain.fishers] == [3, 3]
    assert [step.fisher.batch_size for step in own.fishers] == [5, 5]
    assert own.fishers[0].fisher.labels == "true"


def test_independent_sources_start_from_their_own_seed():
    chained, apart = (study_of(chain=chain).models for chain in (True, False))
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
        study_of(source_tasks=("parcellation-1-7", "brats-2021"), methods=(name,))
