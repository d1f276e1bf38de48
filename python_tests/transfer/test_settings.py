from dataclasses import replace

import pytest

from timm_ext.errors import InputError
from timm_ext.transfer.arms import Adaptation, FineTuning, get_arm
from timm_ext.transfer.settings import AdaptSettings, Recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logit_lr": 0}, r"adapt: logit_lr: expected a finite number greater than 0 \(got 0\)"),
        ({"specific_lr": float("inf")}, r"specific_lr: expected a finite number greater than 0 \(got inf\)"),
        ({"logit_pull": -1.0}, r"logit_pull: expected a finite number at least 0 \(got -1.0\)"),
        ({"weight_pull": float("nan")}, r"weight_pull: expected a finite number at least 0 \(got nan\)"),
        (
            {"warm_up": 1.0},
            r"adapt: warm_up: expected a finite number at least 0 and less than 1 \(got 1.0\)",
        ),
    ],
)
def test_impossible_adaptations_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        AdaptSettings(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, r"seed: expected a whole number from 0 to 4294967295 \(got -1\)"),
        ({"anchor": 101.0}, r"anchor: expected a finite number at least -100 and at most 100 \(got 101.0\)"),
        ({"mixing": "even"}, r"mixing: expected 'sigmoid', .* \(got 'even'\)"),
    ],
)
def test_impossible_recipes_are_refused(changes, message):
    with pytest.raises(InputError, match=f"merge: {message}"):
        Recipe(**changes)


def test_what_an_adaptation_leaves_open_is_as_the_arm_has_it():
    arm = replace(get_arm("t-imm"), adaptation=Adaptation(logit_pull=0.5, warm_up=0.25))
    assert AdaptSettings().of(arm) == AdaptSettings(logit_pull=0.5, warm_up=0.25, weight_pull=0.0)
    assert AdaptSettings(warm_up=0.0).of(arm).to_dict() == {"logit_lr": 0.1, "logit_pull": 0.5}
    with pytest.raises(InputError, match=r"expected weight_pull only for .* \(got 1 for t-imm\)"):
        AdaptSettings(weight_pull=1.0).of(get_arm("t-imm"))


def test_a_pull_of_the_weights_is_the_arms_unless_it_is_given():
    arm = replace(get_arm("t-imm-annealed"), tuning=FineTuning(weight_pull=2.0))
    assert AdaptSettings().of(arm).to_dict() == {"logit_lr": 0.1, "weight_pull": 2.0}
    assert AdaptSettings(weight_pull=0.5).of(arm).weight_pull == 0.5
    assert AdaptSettings(weight_pull=0.0).of(arm).to_dict() == {"logit_lr": 0.1}
