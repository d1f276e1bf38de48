"""Networks of which parts are wrapped: Fisher, bank and merge under the names of any of them."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from timm_ext.fisher import Fisher, estimate_fisher
from timm_ext.layout import Layout
from timm_ext.merging import Bank, MergedModel, assemble_bank
from timm_ext.parameters import split_parameters
from timm_ext.storage.state_dicts import names_among

Wrap = Callable[[nn.Module], nn.Module]
X = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
WRAPS: dict[str, Wrap] = {
    "plain": lambda part: part,
    "compiled": lambda part: torch.compile(part, backend="eager"),
    "DataParallel": nn.DataParallel,
}


def network(seed: int, wrap: Wrap) -> nn.Module:
    torch.manual_seed(seed)
    block = nn.Sequential(nn.Conv3d(3, 3, 3, padding=1), nn.InstanceNorm3d(3), nn.BatchNorm3d(3))
    return nn.Sequential(nn.Conv3d(1, 3, 3), wrap(block), nn.Conv3d(3, 1, 1)).eval()


def fisher(model: nn.Module) -> Fisher:
    return estimate_fisher(model, [(X, None, ["a", "b"])])


def merged(sources: Wrap, target: Wrap, *, assembled: bool) -> nn.Module:
    networks, goal = [network(seed, sources) for seed in (1, 2)], network(3, target)
    states = {str(number): model.state_dict() for number, model in enumerate(networks)}
    fishers = [fisher(model) for model in networks]
    split = split_parameters(goal, heads=["2."], transfer_norms=True)
    if not assembled:
        return MergedModel(goal, Bank.build(states, fishers, Layout.from_model(goal, split.shared))).fold()
    images = {"source_modalities": [["t1"]] * 2, "target_modalities": ["t1"], "input_layers": ["0.weight"]}
    return MergedModel(goal, assemble_bank(goal, states, fishers, split=split, **images)).fold()


@pytest.mark.parametrize("assembled", [False, True])
@pytest.mark.parametrize("target", WRAPS)
@pytest.mark.parametrize("sources", WRAPS)
def test_wrapped_parts_merge_to_the_same_bits(sources: str, target: str, assembled: bool) -> None:
    expected = merged(WRAPS["plain"], WRAPS["plain"], assembled=assembled).state_dict()
    got = merged(WRAPS[sources], WRAPS[target], assembled=assembled).state_dict()
    assert list(got) == list(network(3, WRAPS[target]).state_dict())
    for one, other in zip(got.values(), expected.values(), strict=True):
        assert torch.equal(one, other)


def test_names_that_would_become_one_stay() -> None:
    assert names_among(["a._orig_mod.w", "b"], ["a.w"]) == {"a._orig_mod.w": "a.w", "b": "b"}
    for found, wanted in (
        (["a._orig_mod.w", "a.module.w"], ["a.w"]),
        (["a._orig_mod.w"], ["a.w", "a.module.w"]),
    ):
        assert names_among(found, wanted) == {name: name for name in found}
