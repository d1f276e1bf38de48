import json

import pytest
from study_plans import study_of

from timm_ext.errors import InputError
from timm_ext.study.step import Step, step_from, with_needs
from timm_ext.study.steps import STEPS
from timm_ext.study.steps.crops import CropHeads
from timm_ext.study.steps.data import PreparePool, TakeCases


class Plain(Step):
    x: int = 0


class Other(Plain):
    pass


def test_digest_depends_on_type_fields_and_needed_steps():
    needed = Plain(name="b")
    steps = {
        Plain(name="a", x=1),
        Plain(name="a", x=2),
        Other(name="a", x=1),
        Plain(name="b", x=1),
        Plain(name="a", x=1, needs={"role": needed}),
        Plain(name="a", x=1, needs={"other": needed}),
        Plain(name="a", x=1, needs={"role": Plain(name="b", x=1)}),
    }
    assert len(steps) == len({step.digest for step in steps}) == 7


def test_cost_is_no_part_of_the_question():
    assert Plain(name="a", cost=1) == Plain(name="a", cost=9)
    assert Plain(name="a").question == {"type": "Plain", "name": "a", "x": 0}


def test_with_needs_puts_needed_steps_first_and_once():
    left, right = (Plain(name=name, needs={"s": Plain(name="shared")}) for name in ("left", "right"))
    assert [step.name for step in with_needs([left, right])] == ["shared", "left", "right"]


def test_two_steps_of_one_name_are_refused():
    with pytest.raises(InputError, match="two different steps named a"):
        with_needs([Plain(name="a", x=1), Plain(name="a", x=2)])


def test_a_step_is_made_again_from_its_question_by_a_closed_table():
    made = step_from(json.loads(json.dumps(Other(name="a", x=3).question)), [Plain, Other])
    assert type(made) is Other
    assert made == Other(name="a", x=3)
    with pytest.raises(KeyError):
        step_from(Other(name="a").question, [Plain])


def test_every_step_of_a_study_survives_the_way_to_a_worker():
    methods = ("scratch", "t-imm", "t-imm-annealed", "medmerge", "soup", "ensemble", "transfer-joint")
    study = study_of(methods=methods, seeds=(0,), prepare={"hounsfield": [0, 80]}, size=(16, 16, 16))
    seen = set()
    for step in study.steps:
        made = step_from(json.loads(json.dumps(step.question)), STEPS)
        assert made.model_copy(update={"needs": step.needs}).digest == step.digest
        seen.add(type(step))
    assert seen == {*STEPS} - {PreparePool, TakeCases, CropHeads}
