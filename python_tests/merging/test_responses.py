import math
import weakref

import pytest
import torch
from networks_for_tests import NETWORKS, images, jittered, permuted_copy, random_permutations, tensors_of
from torch import nn

from timm_ext.errors import InputError
from timm_ext.merging import align, align_to_first, responses
from timm_ext.merging.responses import correlations
from timm_ext.networks.channel_trace import trace_channels

CORNERS = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])  # of independent x and y


def network(rows: list[list[float]], bias: tuple[float, ...] = (0, 0, 0)) -> nn.Module:
    """Three channels of x and y, and one that reads them."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[0].weight.data, model[0].bias.data = (
        torch.tensor(rows, dtype=torch.float32),
        torch.tensor(bias, dtype=torch.float32),
    )
    return model


def test_correlations_of_channels_that_are_known() -> None:
    reference = network([[1, 0], [0, 2], [1, 1]])  # x, 2y, x + y
    model = network([[-3, 0], [0, 0], [0, 1]], bias=(5, 1, -2))  # −3x + 5, 1, y − 2
    channels = trace_channels(model, CORNERS)
    half = math.sqrt(0.5)
    expected = torch.tensor([[-1, 0, 0], [0, 0, 1], [-half, 0, half]], dtype=torch.float64)
    for batches in ([CORNERS], [CORNERS[:1], CORNERS[1:]]):  # moments are those of all images together
        (found,) = correlations([model], reference, channels, batches)
        torch.testing.assert_close(found, {"0": expected})


def test_correlations_are_those_of_all_voxels_that_layers_read(monkeypatch) -> None:
    monkeypatch.setattr(responses, "_CHUNK", 1000)  # voxels are summed part by part
    models = [chain(seed) for seed in range(3)]
    batches = [torch.randn(2, 2, 9, 8, 7) + 3, torch.randn(1, 2, 6, 6, 6)]
    found = correlations(models[1:], models[0], trace_channels(models[0], batches[0]), batches)
    read = [[inputs(model, batch) for batch in batches] for model in models]
    for model, own in zip(read[1:], found, strict=True):
        expected = {}
        for group, layer in (("0", 2), ("2", 4)):
            one, two = (torch.cat([batch[layer] for batch in of], 1).double() for of in (read[0], model))
            expected[group] = torch.corrcoef(torch.cat([one, two]))[: len(one), len(one) :]
        torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-10)


def test_the_reference_runs_once_on_a_batch() -> None:
    reference, *models = (chain(seed) for seed in range(3))
    runs: list[int] = []
    reference.register_forward_hook(lambda *_: runs.append(1))
    batches = [torch.randn(1, 2, 6, 6, 6) for _ in range(2)]
    align_to_first([reference, *models], images=batches, example=batches[0])
    assert len(runs) == len(batches)


def test_what_layers_of_a_compared_network_read_is_not_held() -> None:
    reference, model = chain(0), chain(1)
    batch = torch.randn(1, 2, 6, 6, 6)
    channels = trace_channels(model, batch)
    earlier: list[weakref.ref] = []
    held: list[bool] = []

    def before(module: nn.Module, given: tuple[torch.Tensor]) -> None:
        held.extend(tensor() is not None for tensor in earlier)
        earlier.append(weakref.ref(given[0]))

    for layer in (model[2], model[4]):
        layer.register_forward_pre_hook(before)
    correlations([model], reference, channels, [batch])
    assert held == [False]


def chain(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv3d(2, 5, 3), nn.ReLU(), nn.Conv3d(5, 4, 3), nn.LeakyReLU(), nn.Conv3d(4, 1, 1)]
    return nn.Sequential(*layers)


def inputs(model: nn.Module, batch: torch.Tensor) -> dict[int, torch.Tensor]:
    """What each layer reads, `[C, voxels]`."""
    found = {}
    with torch.no_grad():
        for number, layer in enumerate(model):
            found[number] = batch.movedim(1, 0).flatten(1)
            batch = layer(batch)
    return found


def test_networks_of_other_layers_are_told() -> None:
    class Twice(nn.Sequential):
        def forward(self, images):
            return self[1](self[1](self[0](images)))

    batch = torch.randn(1, 2, 6, 6, 6)
    one, two = (kind(nn.Conv3d(2, 3, 3), nn.Conv3d(3, 3, 1)) for kind in (nn.Sequential, Twice))
    with pytest.raises(InputError, match=r"as many layers read channels .* \(got 1 and 2\)"):
        correlations([two], one, trace_channels(one, batch), [batch])


def test_responses_tell_what_weights_do_not() -> None:
    """Where y = −x, the weights 2x + 1.5y look most like 3y, but respond as x does."""
    line = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])
    reference, model = network([[1, 0], [0, 3], [0, 0]]), network([[2, 1.5], [0, 0.1], [0, 0]])
    by_weights = align(model, reference, ignore=["1.*"], example=line)
    by_responses = align(model, reference, ignore=["1.*"], example=line, images=[line])
    assert by_weights.permutations["0"].tolist() == [1, 0, 2]
    assert by_responses.permutations["0"].tolist() == [0, 1, 2]
    assert by_responses.similarity == (pytest.approx(2), pytest.approx(2))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_permuted_copy_is_brought_back_by_responses(name: str) -> None:
    model = jittered(name)
    channels = trace_channels(model)
    twin = permuted_copy(model, channels, random_permutations(channels))
    found = align(twin, model, images=[images(model)])
    assert all(torch.equal(tensors_of(found.model)[n], t) for n, t in tensors_of(model).items())
    assert found.similarity[0] < found.similarity[1]


def test_scales_that_norms_take_back_do_not_count() -> None:
    model = jittered("BasicUNet")
    channels = trace_channels(model)
    twin = permuted_copy(model, channels, random_permutations(channels))
    weight = next(p for p in twin.parameters() if p.ndim == 5)
    with torch.no_grad():
        weight *= torch.logspace(-1, 1, len(weight))[:, None, None, None, None]
    found = align(twin, model, images=[images(model)])
    moved = align(permuted_copy(model, channels, random_permutations(channels)), model).permutations
    assert {n: p.tolist() for n, p in found.permutations.items()} == {n: p.tolist() for n, p in moved.items()}


def test_all_networks_are_compared_with_the_first() -> None:
    first = jittered("UNet")
    channels = trace_channels(first)
    twins = [permuted_copy(first, channels, random_permutations(channels, seed)) for seed in (1, 2)]
    aligned, _ = align_to_first([first, *twins], images=[images(first)])
    assert aligned[0] is first
    for twin in aligned[1:]:
        assert all(torch.equal(p, q) for p, q in zip(twin.parameters(), first.parameters(), strict=True))


def test_images_that_do_not_fit_are_told() -> None:
    one, two = jittered("UNet", 1), jittered("UNet", 2)
    with pytest.raises(InputError, match=r"cannot run on images \[2, 3, 16"):
        align(one, two, images=[images(one).repeat(1, 2, 1, 1, 1)[:, :3]])
    with pytest.raises(InputError, match="got no image"):
        align(one, two, images=[])
    with pytest.raises(InputError, match="got tensors for a reference"):
        align(one, dict(two.named_parameters()), images=[images(one)])
    with pytest.raises(InputError, match=r"same modalities.*got T1, T2 and T2, T1"):
        align_to_first([one, two], modalities=[["T1", "T2"], ["T2", "T1"]], images=[images(one)])
