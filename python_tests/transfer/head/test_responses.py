"""What logits are made of, for networks of several kinds."""

import pytest
import torch

from timm_ext.errors import InputError
from timm_ext.inference import predict_logits
from timm_ext.modes import evaluating
from timm_ext.networks.registry import build_network
from timm_ext.transfer.head.responses import Responses

NETWORKS = {
    "isensee2017": ({"base_filters": 2, "levels": 3}, (4 + 1) + (2 + 1)),
    "monai.BasicUNet": ({"features": [2, 2, 2, 2, 2, 2]}, 3),
    "monai.UNet": ({"channels": [2, 4], "strides": [2], "num_res_units": 0}, (2 + 4) * 27 + 1),
    "monai.SegResNetDS": ({"init_filters": 8, "blocks_down": [1, 1], "dsdepth": 2}, 9),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_columns_times_weights(name):
    options, columns = NETWORKS[name]
    network = build_network(name, in_channels=1, out_channels=3, seed=0, **options)
    before = {n: p.clone() for n, p in network.state_dict().items()}
    image = torch.randn(1, 16, 16, 32, generator=torch.Generator().manual_seed(0))
    responses = Responses(network, image)
    assert (responses.columns, responses.outputs) == (columns, 3)
    weights = torch.randn(columns, 3, generator=torch.Generator().manual_seed(1))
    voxels = torch.tensor([0, 5, 1000, 16 * 16 * 32 - 1])
    product = responses.at(image, voxels) @ weights
    assert all(torch.equal(before[n], p) for n, p in network.state_dict().items())
    with torch.no_grad(), evaluating(network):
        for parameter, tensor in responses.tensors(weights).items():
            network.get_parameter(parameter).copy_(tensor)
        logits = predict_logits(network, image[None])[0].flatten(1)[:, voxels].T
    assert torch.allclose(product, logits, atol=1e-4)


def test_many_columns_are_made_in_parts(monkeypatch):
    network = build_network("isensee2017", in_channels=1, out_channels=2, seed=0, base_filters=2, levels=3)
    image, voxels = torch.ones(1, 8, 8, 8), torch.arange(0, 512, 7)
    whole = Responses(network, image).at(image, voxels)
    monkeypatch.setattr("timm_ext.transfer.head.responses._MOST_BYTES", 3 * 4 * 512)
    assert torch.allclose(Responses(network, image).at(image, voxels), whole, atol=1e-6)


def test_heads_that_are_not_affine_are_refused():
    options = {"channels": [2, 4], "strides": [2], "num_res_units": 1}
    network = build_network("monai.UNet", in_channels=1, out_channels=2, seed=0, **options)
    with pytest.raises(InputError, match=r"^head: expected tensors of heads with one axis along the outputs"):
        Responses(network, torch.randn(1, 16, 16, 16))


def test_outputs_that_are_treated_unlike_each_other_are_refused():
    network = build_network("isensee2017", in_channels=1, out_channels=2, seed=0, base_filters=2, levels=2)
    network.register_forward_hook(lambda model, images, logits: logits.cumsum(1))
    with pytest.raises(InputError, match=r"^head: expected logits that are affine in the parameters"):
        Responses(network, torch.randn(1, 8, 8, 8))
