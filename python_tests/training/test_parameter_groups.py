import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from timm_ext.errors import InputError
from timm_ext.training.callbacks import Observe
from timm_ext.training.examples import Data
from timm_ext.training.parameter_groups import hold_back, named_groups, rate_columns
from timm_ext.training.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parent))
from examples_for_tests import Blobs, settings, small_network


def test_groups_are_completed():
    model = nn.Linear(2, 1)
    groups = named_groups(model, [{"params": [model.weight], "lr": 0.5}, {"params": iter([model.bias])}], 0.1)
    assert [(group["name"], group["lr"], group["start"]) for group in groups] == [
        ("0", 0.5, 0),
        ("1", 0.1, 0),
    ]
    assert groups[1]["params"] == [model.bias]
    assert rate_columns(groups) == ("lr_0", "lr_1")
    assert rate_columns(named_groups(model, None, 0.1)) == ("lr",)


def test_groups_that_are_no_parts_of_the_model_are_refused():
    model = nn.Linear(2, 1)
    with pytest.raises(InputError, match="expected at least one parameter in every parameter group"):
        named_groups(model, [{"params": []}], 0.1)
    with pytest.raises(InputError, match="must be disjoint parts of the model"):
        named_groups(model, [{"params": [model.bias]}, {"params": [model.bias]}], 0.1)


def test_a_group_is_held_back_until_it_starts():
    parameters = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    groups = [{"params": [value], "start": start} for value, start in zip(parameters, (0, 2), strict=True)]
    optimizer = torch.optim.Adam(groups, lr=0.1)
    moved = []
    for step in range(4):
        for parameter in parameters:
            parameter.grad = torch.ones(1)
        hold_back(optimizer, step)
        optimizer.step()
        moved.append([round(1 - parameter.item(), 4) for parameter in parameters])
    # Adam's first step is the rate, whenever it comes.
    assert moved == [[0.1, 0.0], [0.2, 0.0], [0.3, 0.1], [0.4, 0.2]]


def test_a_trained_network_holds_a_group_back(tmp_path):
    model = small_network()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    heads = [value for name, value in model.named_parameters() if "heads" in name]
    rest = [value for name, value in model.named_parameters() if "heads" not in name]
    seen = []

    def look():
        seen.append([not torch.equal(before[n], v) for n, v in model.named_parameters()])
        return torch.zeros(1)

    Trainer(settings(steps=4, validate_every=1), tmp_path).fit(
        model,
        Data(Blobs(2)),
        callbacks=[Observe(look)],
        parameter_groups=[{"params": heads}, {"params": rest, "start": 3}],
    )
    of_heads = ["heads" in name for name in before]
    assert seen == [[False] * len(before), of_heads, of_heads, of_heads, [True] * len(before)]
