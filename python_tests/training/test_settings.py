import json

import pytest

from timm_ext.errors import InputError
from timm_ext.training.settings import TrainSettings


def test_budgets():
    assert TrainSettings(steps=7).total_steps(5) == 7
    assert TrainSettings(epochs=3, batch_size=2).total_steps(5) == 9
    assert TrainSettings(batch_size=2).total_steps(4) == 1000
    assert TrainSettings(batch_size=2).round_steps(5) == 3
    assert TrainSettings(batch_size=2, validate_every=10).round_steps(5) == 10


def test_settings_are_json_values():
    values = TrainSettings(patch=(4, 4, 4)).to_dict()
    assert json.loads(json.dumps(values)) == values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 1, "epochs": 1}, r"expected steps or epochs, not both \(got 1 and 1\)"),
        ({"steps": 0}, r"training: steps: expected a whole number from 1 to 1000000000 \(got 0\)"),
        ({"batch_size": 0}, r"batch_size: expected a whole number from 1 to 4096 \(got 0\)"),
        ({"batch_size": 10**9}, r"batch_size: expected a whole number from 1 to 4096 \(got 1000000000\)"),
        ({"workers": 10**9}, r"workers: expected a whole number from 0 to 1024"),
        ({"steps": 10**30}, r"steps: expected a whole number from 1"),
        ({"devices": 10**9}, r"devices: expected a whole number from 1 to 1024"),
        ({"patch": (10**6,) * 3}, r"patch: expected a whole number from 1 to 4096 \(got 1000000\)"),
        ({"patch": (8, 8, 0)}, r"patch: expected a whole number from 1 to 4096 \(got 0\)"),
        ({"seed": -1}, r"seed: expected a whole number from 0 to 4294967295 \(got -1\)"),
        ({"seed": 2**32}, r"seed: expected a whole number from 0 to 4294967295 \(got 4294967296\)"),
        ({"lr": float("nan")}, r"lr: expected a finite number greater than 0 \(got nan\)"),
        ({"lr_patience": 0}, r"lr_patience: expected a whole number from 1"),
        ({"workers": -1}, r"workers: expected a whole number from 0 to 1024 \(got -1\)"),
        ({"schedule": "linear"}, r"schedule: expected 'plateau', 'cosine' or 'constant' \(got 'linear'\)"),
        ({"keep": "all"}, r"keep: expected 'best', 'last' or 'ema' \(got 'all'\)"),
        ({"precision": "64"}, r"precision: expected '32-true', 'bf16-mixed' or '16-mixed'"),
        ({"l2_transfer": -0.1}, r"l2_transfer: expected a finite number at least 0 \(got -0.1\)"),
        ({"l2_transfer": float("nan")}, r"l2_transfer: expected a finite number at least 0 \(got nan\)"),
        (
            {"drop_transfer": 1.0},
            r"drop_transfer: expected a finite number at least 0 and less than 1 \(got 1.0\)",
        ),
        ({"patch": (4, 4)}, r"training: patch: expected three numbers of voxels \(got \(4, 4\)\)"),
        ({"patches": 3}, r"training: unknown field patches \(expected one of steps, epochs, "),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        TrainSettings(**changes)


def test_ties_decide_the_result():
    plain, tied = TrainSettings(), TrainSettings(l2_transfer=0.1, drop_transfer=0.5)
    with pytest.raises(InputError, match=r"l2_transfer 0.0, now 0.1; drop_transfer 0.0, now 0.5"):
        tied.check_resume(plain.to_dict(), "run")


def test_resume_compares_what_decides_the_result():
    saved = TrainSettings(steps=5).to_dict()
    TrainSettings(steps=9, workers=2, save_every=3, tensorboard=False).check_resume(saved, "run")
    with pytest.raises(InputError, match=r"run: cannot be resumed with other settings: seed 0, now 1"):
        TrainSettings(steps=5, seed=1).check_resume(saved, "run")
    cosine = TrainSettings(steps=5, schedule="cosine")
    with pytest.raises(InputError, match=r"steps 5, now 9"):
        TrainSettings(steps=9, schedule="cosine").check_resume(cosine.to_dict(), "run")
