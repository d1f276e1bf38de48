"""The whole way from source networks to a folded target network, for each kind of network."""

import pytest
import torch
from torch import Tensor, nn

from timm_ext.fisher.result import Fisher, FisherKind
from timm_ext.merging import MergedModel, assemble_bank
from timm_ext.networks import build_network, heads_of, input_layers_of
from timm_ext.parameters import named_parameters, split_parameters

NETWORKS = {
    "isensee2017": {"base_filters": 2, "levels": 3},
    "monai.SegResNet": {"spatial_dims": 3, "init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]},
    "monai.UNet": {"spatial_dims": 3, "channels": [4, 8], "strides": [2], "num_res_units": 1},
    "monai.BasicUNet": {"spatial_dims": 3, "features": [4, 4, 8, 8, 8, 4]},
}


def source(name: str, regions: int, seed: int) -> nn.Module:
    return build_network(name, in_channels=2, out_channels=regions, seed=seed, **NETWORKS[name])


def fisher_of(model: nn.Module, seed: int) -> Fisher:
    generator = torch.Generator().manual_seed(seed)
    tensors = {n: torch.rand(p.shape, generator=generator) for n, p in named_parameters(model).items()}
    return Fisher(tensors=tensors, count=1, kind=FisherKind.BERNOULLI_SAMPLED, scaling="sum over voxels")


@pytest.mark.parametrize("transfer_norms", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_sources_of_other_tasks_become_a_network_of_the_target(name: str, transfer_norms: bool) -> None:
    target = build_network(name, in_channels=3, out_channels=3, seed=0, **NETWORKS[name])
    sources = {"M1": source(name, 7, 1), "M2": source(name, 4, 2)}
    split = split_parameters(target, heads=heads_of(target), transfer_norms=transfer_norms)
    bank = assemble_bank(
        target,
        {key: named_parameters(model) for key, model in sources.items()},
        [fisher_of(model, seed) for seed, model in enumerate(sources.values())],
        split=split,
        source_modalities=[["T1", "T2"]] * 2,
        target_modalities=["T2", "T1", "FLAIR"],
        input_layers=input_layers_of(target),
        normalize="tensor",
    )
    merged = MergedModel(target, bank)
    image = torch.randn(2, 3, 32, 32, 32, generator=torch.Generator().manual_seed(3))
    merged.eval()(image).square().mean().backward()
    assert merged.logits.grad is not None
    assert merged.logits.grad.isfinite().all()
    assert merged.logits.grad.abs().sum() > 0
    with torch.no_grad():
        plain = merged.fold()
        assert torch.equal(plain(image), merged(image))
    between(plain, target, sources, split.shared, input_layers_of(target))


def between(
    plain: nn.Module,
    target: nn.Module,
    sources: dict[str, nn.Module],
    shared: tuple[str, ...],
    input_layers: tuple[str, ...],
) -> None:
    """Assert that shared weights lie between the sources' and all others are the target's own."""
    own = named_parameters(target)
    first, second = (named_parameters(model) for model in sources.values())

    def fitted(name: str, tensor: Tensor) -> Tensor:
        return torch.cat([tensor[:, [1, 0]], own[name][:, 2:]], 1) if name in input_layers else tensor

    for name, tensor in named_parameters(plain).items():
        if name not in shared:
            assert torch.equal(tensor, own[name]), name
            continue
        a, b = fitted(name, first[name]), fitted(name, second[name])
        assert (tensor >= torch.minimum(a, b)).all(), name
        assert (tensor <= torch.maximum(a, b)).all(), name
