"""Buffers beside merged parameters, above all the running statistics of batch norms."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks_for_tests import jittered, permuted_copy, random_permutations
from torch import Tensor, nn

from timm_ext.errors import InputError
from timm_ext.fisher.result import Fisher, FisherKind
from timm_ext.layout import Layout
from timm_ext.merging import (
    Bank,
    MergedModel,
    align_to_first,
    assemble_bank,
    build_initialisation,
    uniform_soup,
)
from timm_ext.merging.buffers import ratios_beside, weighted_mean
from timm_ext.merging.mixing import logits_of
from timm_ext.networks import heads_of
from timm_ext.networks.channel_trace import trace_channels
from timm_ext.parameters import buffer_owners, named_parameters, split_parameters

STATISTICS = ("running_mean", "running_var")


class Block(nn.Module):
    """A convolution with a norm without parameters, and a table of indices beside a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 4, 3, padding=1)
        self.plain_norm = nn.BatchNorm3d(4, affine=False)
        self.norm = nn.BatchNorm3d(4)
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("index", torch.arange(4))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)
        self.head = nn.Sequential(nn.Conv3d(4, 2, 1), nn.BatchNorm3d(2, affine=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.plain_norm(self.conv(x))) * self.scale[self.index][:, None, None, None]
        return self.head(x)


def images(seed: int) -> Tensor:
    return torch.randn(2, 2, 4, 4, 4, generator=torch.Generator().manual_seed(seed)) * 3 + 2


def trained(seed: int, steps: int) -> Block:
    """A network with statistics of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Block()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
            for step in range(steps):
                model(images(100 * seed + step))
    return model.eval()


def sources(count: int = 2) -> dict[str, Block]:
    return {f"M{t + 1}": trained(t, 3 + 2 * t) for t in range(count)}


def bank_of(models: dict[str, Block], *, fisher: bool = False) -> Bank:
    target = Block()
    shared = split_parameters(target, heads=["head."], transfer_norms=True).shared
    states = {name: model.state_dict() for name, model in models.items()}
    fishers = [
        Fisher(
            {n: torch.rand(p.shape, generator=torch.Generator().manual_seed(t)) for n, p in model.items()},
            count=1,
            kind=FisherKind.BERNOULLI_TRUE,
            scaling="sum",
        )
        for t, model in enumerate(map(named_parameters, models.values()))
    ]
    return Bank.build(states, fishers if fisher else None, Layout.from_model(target, shared))


def assert_mean(
    got: nn.Module, models: dict[str, Block], ratios: dict[str, list[float]] | list[float]
) -> None:
    """All statistics are the mean of the sources' by the ratios of their layer, counters the largest."""
    states = [model.state_dict() for model in models.values()]
    for layer in ("norm", "plain_norm"):
        alpha = ratios[layer] if isinstance(ratios, dict) else ratios
        for kind in STATISTICS:
            expected = sum(a * state[f"{layer}.{kind}"] for a, state in zip(alpha, states, strict=True))
            torch.testing.assert_close(got.state_dict()[f"{layer}.{kind}"], expected)
    most = max(int(state["norm.num_batches_tracked"]) for state in states)
    assert got.norm.num_batches_tracked == most
    assert torch.equal(got.index, torch.arange(4))


def test_buffers_belong_to_the_parameters_of_their_module_or_of_the_one_around_it() -> None:
    model = Block()
    shared = split_parameters(model, heads=["head."], transfer_norms=True).shared
    owners = buffer_owners(model, shared)
    every = ("scale", "conv.weight", "conv.bias", "norm.weight", "norm.bias")
    assert set(owners["index"]) == set(every)
    assert owners["plain_norm.running_var"] == ("conv.weight", "conv.bias")
    assert owners["norm.running_mean"] == ("norm.weight", "norm.bias")
    assert not [name for name in owners if name.startswith(("head", "scratch"))]
    assert "norm.running_mean" not in buffer_owners(model, ["scale", "conv.weight"])


@pytest.mark.parametrize("fisher", [False, True])
@pytest.mark.parametrize(
    ("method", "ratios"),
    [
        ("transfer-1", [1.0, 0.0, 0.0]),
        ("transfer-3", [0.0, 0.0, 1.0]),
        ("mean-imm", [1 / 3] * 3),
        ("mode-imm", [1 / 3] * 3),  # buffers have no Fisher
    ],
)
def test_fixed_merges_take_the_statistics_along(method: str, ratios: list[float], fisher: bool) -> None:
    if method == "mode-imm" and not fisher:
        return
    models = sources(3)
    got = build_initialisation(method, Block(), bank_of(models, fisher=fisher))
    assert_mean(got, models, ratios)
    if method.startswith("transfer"):
        source = models[f"M{method[-1]}"]
        assert torch.equal(got.norm.running_mean, source.norm.running_mean)
        assert torch.equal(got.norm.running_var, source.norm.running_var)
    assert torch.equal(got.head[1].running_mean, torch.zeros(2))
    assert got.head[1].num_batches_tracked == 0


def test_one_network_merged_with_itself_is_that_network() -> None:
    model = trained(1, 4)
    for method in ("mean-imm", "transfer-2"):
        got = build_initialisation(method, model, bank_of({"M1": model, "M2": copy.deepcopy(model)}))
        with torch.no_grad():
            assert torch.equal(got.eval()(images(5)), model(images(5)))


@pytest.mark.parametrize("granularity", ["model", "layer"])
def test_a_merged_model_folds_them_by_the_ratios_of_their_layers(granularity: str) -> None:
    models = sources()
    merged = MergedModel(Block(), bank_of(models, fisher=True), granularity=granularity).eval()
    assert_mean(merged.network, models, [0.5, 0.5])
    with torch.no_grad():
        merged.logits.copy_(logits_of(torch.rand(merged.logits.shape) + 0.1))
        out = merged(images(5))
        folded = merged.fold().eval()
        assert torch.equal(folded(images(5)), out)
    alpha = merged.ratios().double()
    by_layer = dict(zip(merged.group_names, alpha.tolist(), strict=True))
    if granularity == "model":
        assert_mean(folded, models, alpha[0].tolist())
    else:
        assert_mean(folded, models, {"norm": by_layer["norm"], "plain_norm": by_layer["conv"]})


def test_ratios_per_channel_hold_for_the_statistics_of_that_channel() -> None:
    models = sources()
    merged = MergedModel(Block(), bank_of(models), granularity="filter")
    with torch.no_grad():
        merged.logits.copy_(logits_of(torch.rand(merged.logits.shape) + 0.1))
    alpha = {name: merged.ratios()[g] for g, name in enumerate(merged.group_names)}
    channels = torch.stack([alpha[f"norm[{c}]"] for c in range(4)])  # [C, T]
    means = torch.stack([model.norm.running_mean for model in models.values()])
    expected = (channels.T * means).sum(0)
    torch.testing.assert_close(merged.fold().norm.running_mean, expected)


def test_free_weights_count_by_their_magnitude() -> None:
    models = sources()
    bank = bank_of(models)
    merged = MergedModel(
        Block(), bank, mixing="free", granularity="model", initial_logits=torch.tensor([1.5, -0.5])
    )
    assert_mean(merged.fold(), models, [0.75, 0.25])
    nothing = MergedModel(Block(), bank, mixing="free", initial_logits=torch.zeros(2))
    assert_mean(nothing.fold(), models, [0.5, 0.5])


def test_statistics_of_training_stay() -> None:
    models = sources()
    merged = MergedModel(Block(), bank_of(models)).train()
    with torch.no_grad():
        merged(images(7))
        merged.logits[:, 0] += 1
    own = merged.network.norm.running_mean.clone()
    assert merged.network.norm.num_batches_tracked == 6
    assert torch.equal(merged.fold().norm.running_mean, own)
    with torch.no_grad():
        merged.eval()(images(8))
    assert torch.equal(merged.network.norm.running_mean, own)


def test_a_loaded_state_stays() -> None:
    models = sources()
    first, second = (MergedModel(Block(), bank_of(models)) for _ in range(2))
    with torch.no_grad():
        first.train()(images(7))
        first.logits[:, 0] += 1
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.fold().norm.running_mean, first.network.norm.running_mean)


def test_parameters_alone_leave_the_network_its_own_buffers() -> None:
    models = sources()
    layout = bank_of(models).layout
    bank = Bank.build({name: dict(named_parameters(model)) for name, model in models.items()}, None, layout)
    assert torch.equal(build_initialisation("mean-imm", Block(), bank).norm.running_mean, torch.zeros(4))


def test_task_specific_norms_start_over_with_their_statistics() -> None:
    models = sources()
    target = Block()
    shared = split_parameters(target, heads=["head."]).shared
    states = {name: model.state_dict() for name, model in models.items()}
    bank = Bank.build(states, None, Layout.from_model(target, shared))
    for got in (build_initialisation("mean-imm", target, bank), MergedModel(target, bank).fold()):
        for norm in (got.norm, got.plain_norm):
            assert torch.equal(norm.running_mean, torch.zeros(4))
            assert torch.equal(norm.running_var, torch.ones(4))
            assert norm.num_batches_tracked == 0


class PlainNorms(nn.Sequential):
    """Norms without parameters alone: of the images, behind a convolution without a bias, behind the head."""

    def __init__(self) -> None:
        norms = [nn.BatchNorm3d(channels, affine=False) for channels in (2, 4, 2)]
        up = nn.ConvTranspose3d(2, 4, 2, stride=2, bias=False)
        super().__init__(norms[0], up, nn.ReLU(), norms[1], nn.Conv3d(4, 2, 1), norms[2])


def test_norms_without_parameters_are_transferred_as_others_are() -> None:
    torch.manual_seed(0)
    models = {name: PlainNorms() for name in ("A", "B")}
    for model in models.values():
        model(images(1) * torch.rand(1))
    states = {name: model.state_dict() for name, model in models.items()}
    for transfer in (False, True):
        split = split_parameters(PlainNorms(), heads=["4."], transfer_norms=transfer)
        bank = assemble_bank(
            PlainNorms(),
            states,
            None,
            split=split,
            source_modalities=[["T1", "T2"]] * 2,
            target_modalities=["T1", "T2"],
            input_layers=[],
        )
        merged = MergedModel(PlainNorms(), bank, granularity="filter")
        with torch.no_grad():
            merged.logits.copy_(logits_of(torch.rand(4, 2) + 0.1))
        got, alpha = merged.fold().state_dict(), merged.ratios()
        rows = torch.stack([state["3.running_mean"] for state in states.values()], dim=1)
        first = torch.stack([state["0.running_mean"] for state in states.values()], dim=1)
        expected = (alpha * rows).sum(1) if transfer else torch.zeros(4)
        torch.testing.assert_close(got["3.running_mean"], expected)
        expected = (alpha.mean(0) * first).sum(1) if transfer else torch.zeros(2)
        torch.testing.assert_close(got["0.running_mean"], expected)
        assert torch.equal(got["5.running_mean"], torch.zeros(2))


Change = Callable[[dict[str, Tensor]], None]


def lacking(state: dict[str, Tensor]) -> None:
    del state["norm.running_var"]


def longer(state: dict[str, Tensor]) -> None:
    state["norm.running_mean"] = torch.zeros(5)


def infinite(state: dict[str, Tensor]) -> None:
    state["norm.running_mean"] = torch.full((4,), torch.inf)


def another_index(state: dict[str, Tensor]) -> None:
    state["index"] = state["index"].flip(0)


def another_type(state: dict[str, Tensor]) -> None:
    state["index"] = state["index"].int()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lacking, r"M2: norm.running_var: expected it as in the other models \(got none\)"),
        (longer, r"M2: norm.running_mean: expected \[4\] torch.float32 as in M1 \(got \[5\] torch.float32\)"),
        (infinite, "M2: norm.running_mean: 4 of 4 elements are NaN or infinite"),
        (another_index, "M2: index: expected the same torch.int64 as in M1"),
        (another_type, r"M2: index: expected \[4\] torch.int64 as in M1 \(got \[4\] torch.int32\)"),
    ],
)
def test_buffers_that_cannot_be_merged_are_named(
    change: Callable[[dict[str, Tensor]], None], line: str
) -> None:
    models = sources()
    states = {name: model.state_dict() for name, model in models.items()}
    change(states["M2"])
    with pytest.raises(InputError, match=rf"buffers: expected .* \(got 1 that cannot\)\n  {line}"):
        Bank.build(states, None, bank_of(models).layout)


def test_a_network_with_other_buffers_is_refused() -> None:
    target = Block()
    target.index = torch.arange(5)
    bank = bank_of(sources())
    for make in (lambda: MergedModel(target, bank), lambda: build_initialisation("mean-imm", target, bank)):
        with pytest.raises(InputError, match=r"index: expected \[4\] \(got \[5\]\)"):
            make()


def test_a_soup_follows_the_same_rule() -> None:
    models = sources()
    soup = uniform_soup(list(models.values()))
    assert_mean(soup, models, [0.5, 0.5])
    models["M2"].index += 1
    with pytest.raises(InputError, match="index: expected the same"):
        uniform_soup(list(models.values()))


def test_a_bank_on_disk_keeps_them(tmp_path: Path) -> None:
    models = sources()
    bank = bank_of(models, fisher=True)
    bank.save(tmp_path / "bank.safetensors")
    loaded = Bank.load(tmp_path / "bank.safetensors")
    got, expected = (build_initialisation("mode-imm", Block(), b).state_dict() for b in (loaded, bank))
    shared = [n for n in got if not n.startswith("head")]
    assert all(torch.equal(got[name], expected[name]) for name in shared)


def test_they_move_with_the_channels_of_aligned_networks() -> None:
    first = jittered("UNet, batch norm")
    channels = trace_channels(first)
    other = permuted_copy(first, channels, random_permutations(channels))
    _, aligned = align_to_first([first, other], ignore=heads_of(first))[0]
    statistics = [name for name in first.state_dict() if name.endswith(STATISTICS)]
    assert statistics
    for name in statistics:
        assert torch.equal(aligned.state_dict()[name], first.state_dict()[name])


def test_means_are_exact_where_the_sources_agree_and_between_them_elsewhere() -> None:
    rows = torch.rand(3, 5)
    same = rows[:1].expand(3, 5)
    ratios = torch.tensor([[0.1, 0.2, 0.7]])
    assert torch.equal(weighted_mean(same, ratios), rows[0])
    mean = weighted_mean(rows, ratios)
    assert bool(((mean >= rows.amin(0)) & (mean <= rows.amax(0))).all())
    torch.testing.assert_close(mean, (ratios.T * rows).sum(0))


def test_ratios_of_segments_that_span_tensors() -> None:
    layout = Layout.from_tensors({"a": torch.zeros(3), "b": torch.zeros(2), "c": torch.zeros(4)})
    alpha = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    offsets, rows = torch.tensor([0, 4, 9]), torch.tensor([1, 0])
    got = ratios_beside((7,), ("a", "b"), layout, alpha, offsets, rows)
    torch.testing.assert_close(got, torch.tensor([[(4 * 0.2 + 0.9) / 5, (4 * 0.8 + 0.1) / 5]]).double())
    alike = ratios_beside((2,), ("a", "b"), layout, alpha, offsets, rows)
    torch.testing.assert_close(alike, torch.tensor([[0.2, 0.8], [0.9, 0.1]]).double())
