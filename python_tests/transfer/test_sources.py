from dataclasses import replace

import pytest
import torch
from networks_for_tests import permuted_copy, random_permutations

from timm_ext.data.tasks import get_task, task_to_dict
from timm_ext.errors import InputError
from timm_ext.fisher import Fisher, FisherKind
from timm_ext.merging import MergedModel
from timm_ext.networks.channel_trace import trace_channels
from timm_ext.networks.io import save_network
from timm_ext.transfer.settings import Recipe
from timm_ext.transfer.sources import load_sources, with_fishers
from timm_ext.transfer.start import network_of, new_network, start_from

TASKS = ("parcellation-1-7", "parcellation-8-14")
OPTIONS = {"base_filters": 2, "levels": 3}
WEIGHT = "encoder.1.entry.conv.weight"
FIRST = "encoder.0.entry.conv.weight"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two source networks with Fishers of 1 and 3 everywhere."""
    folder = tmp_path_factory.mktemp("sources")
    models, fishers = [], []
    for number, name in enumerate(TASKS, 1):
        task = get_task(name)
        model = new_network("isensee2017", OPTIONS, task, number)
        models.append(folder / f"M{number}.safetensors")
        sha = save_network(models[-1], model, task=task_to_dict(task))
        fishers.append(folder / f"F{number}.safetensors")
        values = {name: torch.full_like(p, 2.0 * number - 1).detach() for name, p in model.named_parameters()}
        Fisher(values, 2, FisherKind.BERNOULLI_SAMPLED, "sum over voxels").save(
            fishers[-1], network_sha256=sha
        )
    return models, fishers


def state(model):
    return model.state_dict()


def test_mode_imm_by_hand_with_matched_modalities(files):
    sources = load_sources(*files)
    task = get_task("brats")
    target = network_of(sources, task, seed=7)
    merged = state(start_from("mode-imm", target, task, sources, Recipe()).model)
    one, two = map(state, sources.networks)
    torch.testing.assert_close(merged[WEIGHT], (one[WEIGHT] + 3 * two[WEIGHT]) / 4)
    first = (one[FIRST] + 3 * two[FIRST]) / 4
    torch.testing.assert_close(merged[FIRST][:, [0, 2]], first)
    assert torch.equal(merged[FIRST][:, [1, 3]], state(target)[FIRST][:, [1, 3]])  # T1c and FLAIR
    heads = [name for name in merged if name.startswith("heads.") or "norm" in name]
    assert heads
    assert all(torch.equal(merged[name], state(target)[name]) for name in heads)


def test_precision_of_the_sources_by_hand(files):
    """Fishers 1 and 3 of two examples each, 0 where no source saw the channel; and 1 % of their mean."""
    sources, task = load_sources(*files), get_task("brats")
    target = network_of(sources, task, seed=7)
    for name, held in (("mode-imm-posterior", (2 * 1 + 2 * 3) / 2), ("transfer-2-ewc", 2 * 3)):
        start = start_from(name, target, task, sources, Recipe())
        assert start.prior_cases == 4
        assert start.precision.keys() == set(start.split.shared)
        first = start.precision[FIRST]
        torch.testing.assert_close(first[:, 0] - first[:, 1], torch.full_like(first[:, 0], held))
        assert 0.9 * 0.01 * held < first[:, 1].max() == first[:, 1].min() < 0.01 * held
        assert torch.equal(start.precision[WEIGHT].max(), first[:, 0].max())
    assert not start_from("mode-imm", target, task, sources, Recipe()).precision


def test_normalised_fishers_weigh_each_tensor_by_its_shares(files):
    """F1 = 1 is constant, F2 = 3 but for one element of 6: both tensors are divided by their sums."""
    sources = load_sources(*files)
    task = get_task("brats")
    target = network_of(sources, task, seed=7)
    sources.fishers[1].tensors[WEIGHT].view(-1)[0] = 6
    one, two = (state(network)[WEIGHT].double() for network in sources.networks)
    weights = [fisher.tensors[WEIGHT].double() for fisher in sources.fishers]
    first, second = (weight / weight.sum() for weight in weights)
    expected = (first * one + second * two) / (first + second)

    def merged(name, **options):
        return state(start_from(name, target, task, sources, Recipe(**options)).model)[WEIGHT].double()

    torch.testing.assert_close(merged("mode-imm-normalized"), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(merged("mode-imm", normalize="tensor"), merged("mode-imm-normalized"))
    assert torch.equal(
        merged("mode-imm", normalize="model"), merged("mode-imm-normalized", normalize="model")
    )
    assert not torch.allclose(merged("mode-imm"), expected)


def test_merge_in_a_source_keeps_its_heads_and_norms(files):
    sources = load_sources(*files)
    for index, network in enumerate(sources.networks):
        same = start_from(f"transfer-{index + 1}", network, sources.tasks[index], sources, Recipe()).model
        assert all(torch.equal(state(same)[name], value) for name, value in state(network).items())
        other = start_from(f"transfer-{2 - index}", network, sources.tasks[index], sources, Recipe()).model
        assert torch.equal(state(other)[WEIGHT], state(sources.networks[1 - index])[WEIGHT])
        assert torch.equal(state(other)["heads.0.bias"], state(network)["heads.0.bias"])


def test_t_imm_starts_at_given_logits(files):
    sources = load_sources(*files)
    task = get_task("brats")
    target = network_of(sources, task, seed=7)
    start = start_from("t-imm", target, task, sources, Recipe(), initial_logits=torch.tensor([40.0, -40.0]))
    assert isinstance(start.model, MergedModel)
    torch.testing.assert_close(state(start.model.fold())[WEIGHT], state(sources.networks[0])[WEIGHT])


def test_transferred_norms_are_merged(files):
    sources = load_sources(*files)
    task = get_task("brats")
    start = start_from("mean-imm", network_of(sources, task, 0), task, sources, Recipe(transfer_norms=True))
    assert any("norm" in name for name in start.split.shared)
    assert not any("norm" in name for name in start.split.specific)


def test_scratch_needs_no_sources():
    task = get_task("brats")
    target = new_network("isensee2017", OPTIONS, task, 3)
    model = start_from("scratch", target, task, None, Recipe()).model
    assert all(torch.equal(state(model)[name], value) for name, value in state(target).items())


def test_names_come_from_the_files_and_stay_distinct(files, tmp_path):
    models, fishers = files
    assert load_sources(models).names == ("M1", "M2")
    twin = tmp_path / "M1.safetensors"
    twin.write_bytes(models[0].read_bytes())
    assert load_sources([models[0], twin]).names == ("M1-1", "M1-2")
    assert load_sources(models, fishers, names=["a", "b"]).names == ("a", "b")


def test_wrong_fishers(files):
    models, fishers = files
    named = r"expected one for each of 2 networks, by --fisher FILE in their order \(got 1\)"
    with pytest.raises(InputError, match=named):
        load_sources(models, fishers[:1])
    with pytest.raises(InputError, match="that of another network"):
        load_sources(models, fishers[::-1])


def test_a_network_must_name_its_task(tmp_path):
    path = tmp_path / "M.safetensors"
    save_network(path, new_network("isensee2017", OPTIONS, get_task(TASKS[0]), 0))
    with pytest.raises(InputError, match="expected a network that names its task"):
        load_sources([path])


def test_a_method_with_fishers_needs_them(files):
    sources = load_sources(files[0])
    task = get_task("brats")
    with pytest.raises(InputError, match="mode-imm: expected a Fisher for each source network"):
        start_from("mode-imm", network_of(sources, task, 0), task, sources, Recipe())


@pytest.fixture(scope="module")
def moved(files, tmp_path_factory):
    """M1, and M1 with its channels at other places under the head of another task; their Fishers."""
    sources = load_sources(*files)
    first, other = sources.networks
    channels = trace_channels(first)
    twin = permuted_copy(first, channels, random_permutations(channels))
    for target, source in zip(other.parameters(), twin.parameters(), strict=True):
        if target.shape == source.shape:
            target.data.copy_(source)
    for head, source in zip(other.heads, twin.heads, strict=True):
        head.weight.data.copy_(source.weight[:1].expand_as(head.weight))
    squares = tuple(
        replace(fisher, tensors={n: p.detach() ** 2 for n, p in network.named_parameters()})
        for fisher, network in zip(sources.fishers, sources.networks, strict=True)
    )
    return replace(sources, fishers=squares)


def test_aligned_sources_are_in_the_order_of_the_first(moved):
    aligned = moved.aligned()
    assert aligned.networks[0] is moved.networks[0]
    one, two = map(state, aligned.networks)
    assert all(torch.equal(one[name], two[name]) for name in one if not name.startswith("heads."))
    assert not torch.equal(two["heads.0.weight"], state(moved.networks[1])["heads.0.weight"])
    for fisher, network in zip(aligned.fishers, aligned.networks, strict=True):
        assert all(torch.equal(fisher.tensors[n], p**2) for n, p in network.named_parameters())
    assert aligned.aligned() is aligned


@pytest.mark.parametrize(
    ("method", "recipe"),
    [
        ("mean-aligned", Recipe()),
        ("mode-imm-aligned", Recipe()),
        ("medmerge-aligned", Recipe()),
        ("t-imm", Recipe(align=True)),
    ],
)
def test_aligned_methods_merge_aligned_sources(moved, method, recipe):
    task = get_task("brats")
    target = network_of(moved, task, seed=7)
    model = start_from(method, target, task, moved, recipe).model
    model = model.fold() if isinstance(model, MergedModel) else model
    torch.testing.assert_close(state(model)[WEIGHT], state(moved.networks[0])[WEIGHT])
    plain = start_from("mean-imm", target, task, moved, Recipe()).model
    assert not torch.allclose(state(plain)[WEIGHT], state(moved.networks[0])[WEIGHT])


def test_norms_are_transferred_by_method(files):
    sources = load_sources(*files)
    task = get_task("brats")
    target = network_of(sources, task, 0)
    start, plain = (start_from(name, target, task, sources, Recipe()) for name in ("t-imm-norms", "t-imm"))
    assert {name for name in start.split.shared if "norm" in name} == {
        name for name in plain.split.specific if "norm" in name
    }
    assert isinstance(start.model, MergedModel)
    assert "encoder.0.entry.norm" in start.model.group_names


def test_an_anchor_is_part_of_the_recipe(files):
    sources = load_sources(files[0])
    task = get_task("brats")
    target = network_of(sources, task, 0)
    start = start_from("medmerge", target, task, sources, Recipe(anchor=-30.0, mixing="softmax"))
    assert isinstance(start.model, MergedModel)
    assert start.model.logits[0].tolist() == [-30, 30]
    torch.testing.assert_close(state(start.model.fold())[WEIGHT], state(sources.networks[1])[WEIGHT])


@pytest.mark.parametrize("method", ["t-imm", "t-imm-annealed", "medmerge-aligned", "transfer-2", "scratch"])
def test_what_is_said_of_each_tensor_is_what_became_of_it(moved, method):
    task = get_task("brats")
    target = network_of(moved, task, seed=7)
    for parameter in target.parameters():
        parameter.data.fill_(5)
    start = start_from(method, target, task, moved, Recipe())
    network = start.model.fold() if isinstance(start.model, MergedModel) else start.model
    found, own = state(network), state(target)
    assert [use.name for use in start.uses] == list(own)
    for use in start.uses:
        assert (use.use == "merged") != torch.equal(found[use.name], own[use.name])
        assert use.shape == tuple(own[use.name].shape)
    merged = {use.name: use for use in start.uses if use.use == "merged"}
    reading = {"T1": "T1", "T1c": None, "T2": "T2", "FLAIR": None}
    if method == "scratch":
        assert not merged
        return
    assert merged[FIRST].mapped == {"M1": reading, "M2": reading}
    assert not merged[WEIGHT].mapped
    one, two = state(moved.networks[1]), state(moved.aligned().networks[1])
    aligned = {name for name in merged if not torch.equal(one[name], two[name])}
    told = {name for name, use in merged.items() if use.moved and not name.endswith("bias")}  # all are 0
    assert told == (aligned if "aligned" in method else set())


def test_fishers_of_networks_in_one_order_are_those_that_were_aligned_with_them(files, tmp_path):
    models, fishers = files[0], [tmp_path / "1", tmp_path / "2"]
    for seed, path in enumerate(fishers):
        fisher, generator = Fisher.load(files[1][seed]), torch.Generator().manual_seed(seed)
        drawn = {
            name: torch.rand(tensor.shape, generator=generator) for name, tensor in fisher.tensors.items()
        }
        replace(fisher, tensors=drawn).save(path)
    together = load_sources(models, fishers).aligned()
    after = with_fishers(load_sources(models).aligned(), models, fishers)
    assert after.in_order
    assert after.moved == together.moved
    assert any(after.moved[1].values())
    assert after.fisher_hashes == together.fisher_hashes != ()
    for one, other in zip(after.fishers, together.fishers, strict=True):
        assert all(torch.equal(one.tensors[name], tensor) for name, tensor in other.tensors.items())
