import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from timm_ext.data.tasks import task_from_dict
from timm_ext.errors import InputError
from timm_ext.training.examples import Data
from timm_ext.training.objective import (
    Objective,
    dice_cross_entropy_loss,
    loss_of,
    over_heads,
    soft_dice_loss,
)
from timm_ext.training.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parent))
from examples_for_tests import Blobs, settings


def test_soft_dice_by_hand():
    probabilities = torch.tensor([[0.2, 0.8, 0.5, 0.5], [0.9, 0.1, 0.1, 0.1]]).reshape(1, 2, 1, 2, 2)
    targets = torch.tensor([[0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]).reshape(1, 2, 1, 2, 2)
    # Region 1: 2 (0.8 + 0.5) / (2.0 + 2). Region 2: 2 · 0.9 / (1.2 + 1).
    expected = 1 - (2.6 / 4.0 + 1.8 / 2.2) / 2
    assert soft_dice_loss()(probabilities.logit(), targets).item() == pytest.approx(expected, abs=1e-5)


def test_loss_is_the_mean_over_examples():
    logits, targets = torch.randn(3, 2, 4, 4, 4), (torch.rand(3, 2, 4, 4, 4) > 0.5).float()
    loss = soft_dice_loss()
    each = [loss(logits[i : i + 1], targets[i : i + 1]) for i in range(3)]
    assert torch.allclose(loss(logits, targets), torch.stack(each).mean())


def test_perfect_and_empty_regions():
    targets = torch.zeros(1, 2, 2, 2, 2)
    targets[0, 0, 0] = 1
    logits = (targets - 0.5) * 200
    assert soft_dice_loss()(logits, targets).item() == pytest.approx(0, abs=1e-6)
    assert soft_dice_loss()(-logits, targets).item() == pytest.approx(1, abs=1e-4)


def test_half_precision_logits_do_not_overflow():
    logits, targets = torch.zeros(1, 1, 64, 64, 64, dtype=torch.float16), torch.ones(1, 1, 64, 64, 64)
    assert soft_dice_loss()(logits, targets).item() == pytest.approx(1 / 3, abs=1e-5)


def test_the_penalty_of_a_step_is_differentiated_and_not_logged(tmp_path):
    model = nn.Conv3d(1, 1, 1)
    before = [model.weight.item(), model.bias.item()]
    asked = []

    def penalty(step):
        asked.append(step)
        return 5 * model.bias.sum()

    objective = Objective(loss=lambda logits, targets: 1 + 0 * logits.sum(), penalty=penalty)
    history = Trainer(settings(steps=2, lr=0.1), tmp_path).fit(model, Data(Blobs(2)), objective)
    assert asked == [0, 1]
    assert [row["loss"] for row in history.rows] == [1.0, 1.0]
    assert model.weight.item() == before[0]
    assert model.bias.item() == pytest.approx(before[1] - 2 * 0.1)


def test_dice_and_cross_entropy_of_softmax_classes_by_hand():
    probabilities = torch.tensor([[0.7, 0.2], [0.2, 0.5], [0.1, 0.3]]).view(1, 3, 1, 1, 2)
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]).view(1, 3, 1, 1, 2)
    first = 1 - (2 * 0.5) / (0.7 + 1)
    second = 1 - 1e-5 / (0.4 + 1e-5)
    expected = (first + second) / 2 - (math.log(0.7) + math.log(0.5)) / 2
    assert dice_cross_entropy_loss()(probabilities.log(), targets).item() == pytest.approx(expected, abs=1e-4)


def test_the_loss_follows_the_task():
    logits, targets = torch.randn(1, 3, 2, 2, 2), torch.zeros(1, 3, 2, 2, 2)
    targets[:, 1] = 1
    halves = {"name": "halves", "modalities": ["T1"], "regions": {"front": [1], "back": [2]}}
    softmax = loss_of(task_from_dict({**halves, "softmax": True}))(logits, targets)
    assert softmax == dice_cross_entropy_loss()(logits, targets)
    assert loss_of(None)(logits, targets) == soft_dice_loss()(logits, targets)
    assert loss_of(task_from_dict(halves))(logits, targets) == soft_dice_loss()(logits, targets)


def test_heads_of_deep_supervision_count_half_as_much_from_one_to_the_next():
    generator = torch.Generator().manual_seed(0)
    targets = torch.rand(2, 3, 8, 8, 8, generator=generator).round()
    maps = [torch.randn(2, 3, edge, edge, edge, generator=generator) for edge in (8, 4, 2)]
    loss = soft_dice_loss()
    coarse = [targets[:, :, step // 2 :: step, step // 2 :: step, step // 2 :: step] for step in (2, 4)]
    parts = [loss(one, target) for one, target in zip(maps, [targets, *coarse], strict=True)]
    expected = (4 * parts[0] + 2 * parts[1] + parts[2]) / 7
    torch.testing.assert_close(over_heads(loss, maps, targets), expected)
    torch.testing.assert_close(over_heads(loss, maps[:1], targets), parts[0])
    stacked = torch.stack([maps[0], maps[0].flip(0)], dim=1)  # as DynUNet has them, on one grid
    both = (2 * parts[0] + loss(maps[0].flip(0), targets)) / 3
    torch.testing.assert_close(over_heads(loss, stacked, targets), both)


@pytest.mark.parametrize(
    ("outputs", "told"),
    [
        ([], r"\(got \)"),
        (None, "got NoneType"),
        (torch.zeros(2, 3, 4, 4, 4), r"got \[2, 3, 4, 4, 4\]"),
        ([torch.zeros(2, 3, 8, 8, 8), torch.zeros(2, 1, 4, 4, 4)], r"got \[2, 3, 8.*\[2, 1, 4, 4, 4\]"),
    ],
)
def test_outputs_that_are_no_maps_of_the_targets(outputs, told):
    with pytest.raises(InputError, match=rf"expected logits \[2, 3, 8, 8, 8\] from the network .*{told}"):
        over_heads(soft_dice_loss(), outputs, torch.zeros(2, 3, 8, 8, 8))
