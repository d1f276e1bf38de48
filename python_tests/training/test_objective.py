import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from timm_ext.training.examples import Data
from timm_ext.training.objective import Objective, soft_dice_loss
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
