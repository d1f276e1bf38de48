import itertools

import pytest
import torch
from networks_for_tests import NETWORKS, images, jittered, permuted_copy, random_permutations, tensors_of
from torch import nn
from torch.nn import functional

from timm_ext.errors import InputError
from timm_ext.fisher import Fisher, FisherAccumulator
from timm_ext.merging.alignment import align, align_to_first, assign
from timm_ext.networks import build_network, heads_of
from timm_ext.networks.channel_trace import trace_channels
from timm_ext.networks.channels import ChannelGroup
from timm_ext.parameters import matches, named_parameters


def distance(one: nn.Module, other: nn.Module) -> float:
    """|θ − θ'|² over the parameters but the heads."""
    pairs = zip(named_parameters(one).items(), other.parameters(), strict=True)
    return sum(((p - q) ** 2).sum().item() for (n, p), q in pairs if not matches(n, heads_of(one)))


@pytest.mark.parametrize("name", NETWORKS)
def test_aligned_networks_compute_the_same_function(name: str) -> None:
    model, reference = jittered(name, 1), jittered(name, 2)
    aligned = align(model, reference).model
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), aligned.parameters(), strict=True))
    with torch.no_grad():
        one, two = model(images(model)), aligned(images(model))
        model.double(), aligned.double()
        exact, same = model(images(model, torch.float64)), aligned(images(model, torch.float64))
    scale = exact.abs().max()
    assert (exact - same).abs().max() < 1e-11 * scale
    # In float32 the channels' sums are rounded in another order: no more than float32 itself is off.
    assert (one - two).abs().max() < 4 * (one - exact).abs().max() + 1e-6 * scale


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_permuted_copy_is_brought_back(name: str, seed: int) -> None:
    model = jittered(name)
    channels = trace_channels(model)
    moved = random_permutations(channels, seed)
    twin = permuted_copy(model, channels, moved)
    found = align(twin, model, seed=seed)
    assert all(torch.equal(tensors_of(found.model)[n], t) for n, t in tensors_of(model).items())
    for group, permutation in found.permutations.items():
        assert moved[group][permutation].tolist() == list(range(len(permutation)))


@pytest.mark.parametrize("name", NETWORKS)
def test_similarity_grows_and_the_distance_falls_by_twice_as_much(name: str) -> None:
    model, reference = jittered(name, 1), jittered(name, 2)
    found = align(model, reference, ignore=heads_of(model), seed=3)
    assert len(found.similarity) > 2
    assert all(before < after for before, after in itertools.pairwise(found.similarity))
    gained = found.similarity[-1] - found.similarity[0]
    fallen = distance(model, reference) - distance(found.model, reference)
    assert fallen == pytest.approx(2 * gained, rel=1e-3)
    assert fallen > 0


def trained(seed: int) -> nn.Module:
    """A network after a few steps from its own initialisation, on the same task."""
    model = NETWORKS["isensee2017"](seed).train()
    x = torch.randn(2, 2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(10):
            optimiser.zero_grad()
            functional.binary_cross_entropy_with_logits(model(x), (x[:, [0, 1, 1]] > 0).float()).backward()
            optimiser.step()
    return model.eval()


def test_trained_networks_of_other_seeds_come_closer() -> None:
    model, reference = trained(1), trained(2)
    aligned = align(model, reference, ignore=heads_of(model)).model
    assert distance(aligned, reference) < 0.98 * distance(model, reference)


def test_one_group_along_both_axes_of_a_weight_still_gains() -> None:
    """There the assignment sees one axis only, and may lose on the other."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.inner, self.leave = nn.Linear(1, 12), nn.Linear(12, 12), nn.Linear(12, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.leave(self.enter(x) + self.inner(self.enter(x)))

    for seed in range(5):
        torch.manual_seed(seed)
        model, reference = Residual(), Residual()
        found = align(model, reference, example=torch.zeros(1, 1), seed=seed)
        assert list(found.permutations) == ["enter"]
        assert all(before < after for before, after in itertools.pairwise(found.similarity))
        x = torch.linspace(-1, 1, 5)[:, None]
        torch.testing.assert_close(found.model(x), model(x))


def test_aligned_again_nothing_moves() -> None:
    model, reference = jittered("isensee2017", 1), jittered("isensee2017", 2)
    found = align(align(model, reference).model, reference, seed=5)
    assert all(p.tolist() == list(range(len(p))) for p in found.permutations.values())
    assert len(found.similarity) == 1


def test_the_seed_decides_the_result() -> None:
    model, reference = jittered("isensee2017", 1), jittered("isensee2017", 2)
    one, two, other = (align(model, reference, seed=seed).permutations for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_ignored_heads_are_not_compared_but_permuted() -> None:
    model, reference = jittered("isensee2017", 1), jittered("isensee2017", 2)
    plain = align(model, reference, ignore=["heads."]).permutations
    for head in reference.heads:
        head.weight.data *= 1000
    shouting = align(model, reference, ignore=["heads."])
    assert all(torch.equal(plain[name], shouting.permutations[name]) for name in plain)
    assert not torch.equal(shouting.model.heads[0].weight, model.heads[0].weight)
    compared = align(model, reference).permutations
    assert not all(torch.equal(plain[name], compared[name]) for name in plain)


def test_heads_of_other_tasks_may_differ_in_shape() -> None:
    model = jittered("isensee2017", 1)
    other = build_network("isensee2017", in_channels=2, out_channels=5, seed=2, base_filters=4, levels=3)
    with pytest.raises(
        InputError, match=r"network: heads.0.weight: expected \[5, 8, 1, 1, 1\] as in reference"
    ):
        align(model, other)
    aligned = align(model, other, ignore=heads_of(model)).model
    assert distance(aligned, other) < distance(model, other)


def test_a_reference_may_be_tensors() -> None:
    model, reference = jittered("isensee2017", 1), jittered("isensee2017", 2)
    by_name = align(model, {name: p.detach() for name, p in named_parameters(reference).items()})
    by_module = align(model, reference)
    assert by_name.similarity == by_module.similarity


@pytest.mark.parametrize("name", ["isensee2017", "UNet", "SegResNet"])
def test_the_fisher_of_the_aligned_network_is_the_permuted_one(name: str) -> None:
    model, reference = jittered(name, 1).double(), jittered(name, 2).double()
    x = images(model, torch.float64)[:, :, : 2 * model.size_divisor]
    found = align(model, reference)
    one, two = (fisher_of(net, x) for net in (model, found.model))
    permuted = found.permute_fisher(one)
    assert permuted.zero == two.zero
    assert permuted.metadata == one.metadata
    largest = max(tensor.max().item() for tensor in two.tensors.values())
    for key, tensor in two.tensors.items():
        torch.testing.assert_close(permuted.tensors[key], tensor, rtol=1e-6, atol=1e-12 * largest)
    weight = moved_weight(found)
    assert not torch.allclose(one.tensors[weight], two.tensors[weight])


def moved_weight(found) -> str:
    return next(
        axis.tensor
        for axis in found.channels.axes
        if axis.tensor.endswith("weight")
        and axis.order(found.permutations).tolist() != list(range(axis.length))
    )


def fisher_of(model: nn.Module, x: torch.Tensor) -> Fisher:
    accumulator = FisherAccumulator(model, labels="true")
    with accumulator:
        accumulator.update(x, torch.ones(len(x), 3, *x.shape[2:], dtype=x.dtype), ["a", "b"])
    return accumulator.result()


def test_all_sources_are_aligned_to_the_first() -> None:
    models = [jittered("isensee2017", seed) for seed in range(3)]
    fishers = [
        Fisher({n: p.detach() ** 2 for n, p in named_parameters(m).items()}, 1, "kind", "sum") for m in models
    ]
    aligned, moved = align_to_first(models, fishers, ignore=["heads."])
    assert aligned[0] is models[0]
    assert moved[0] is fishers[0]
    for before, after in zip(models[1:], aligned[1:], strict=True):
        assert distance(after, models[0]) < distance(before, models[0])
    for model, fisher in zip(aligned, moved, strict=True):
        assert all(torch.equal(fisher.tensors[n], p**2) for n, p in named_parameters(model).items())
    assert align_to_first(models)[1] is None


def test_other_modalities_are_compared_by_name() -> None:
    first = jittered("isensee2017", 1)
    twin = build_network("isensee2017", in_channels=3, out_channels=3, seed=9, base_filters=4, levels=3)
    name = "encoder.0.entry.conv.weight"
    for key, tensor in tensors_of(first).items():
        if key != name:
            tensors_of(twin)[key].copy_(tensor)
    t1, t2 = tensors_of(first)[name].unbind(1)
    tensors_of(twin)[name].copy_(torch.stack([t2, t1, t1], 1))  # T2, T1, T1c
    channels = trace_channels(twin)
    moved = permuted_copy(twin, channels, random_permutations(channels))
    arguments = {"ignore": ["heads."], "input_layers": [name]}
    (_, back), _ = align_to_first([first, moved], modalities=[["T1", "T2"], ["T2", "T1", "T1c"]], **arguments)
    assert all(torch.equal(p, q) for p, q in zip(back.parameters(), twin.parameters(), strict=True))
    with pytest.raises(InputError, match=rf"{name}: expected"):
        align_to_first([first, moved], **arguments)


@pytest.mark.parametrize("blocks", [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0], [1], [2], [3]]])
def test_assignment_is_the_best_of_all(blocks: list[list[int]]) -> None:
    group = ChannelGroup("layer", torch.tensor(blocks))
    parts = {frozenset(block) for block in blocks}
    for seed in range(20):
        gains = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        allowed = (
            order
            for order in itertools.permutations(range(4))
            if {frozenset(order[i] for i in block) for block in blocks} == parts
        )
        best = max(sum(gains[i, j].item() for i, j in enumerate(order)) for order in allowed)
        chosen = assign(gains, group)
        assert sum(gains[i, j].item() for i, j in enumerate(chosen.tolist())) == pytest.approx(best)
