import pytest
import torch
from torch import nn

from timm_ext.checkpoint import save_checkpoint
from timm_ext.errors import InputError
from timm_ext.networks.io import load_network, save_network
from timm_ext.networks.registry import build_network, config_of

NETWORKS = {
    "isensee2017": {"base_filters": 2, "levels": 2},
    "monai.UNet": {"channels": [2, 4], "strides": [2], "norm": "batch"},
    "monai.DynUNet": {
        "kernel_size": [3, 3, 3],
        "strides": [1, 2, 2],
        "upsample_kernel_size": [2, 2],
        "filters": [2, 4, 8],
    },
}


def _network(name="isensee2017", seed=0, out_channels=2):
    return build_network(name, in_channels=1, out_channels=out_channels, seed=seed, **NETWORKS[name])


@pytest.mark.parametrize("name", NETWORKS)
def test_network_returns_with_weights_buffers_and_provenance(tmp_path, name):
    model = _network(name)
    model.train()(torch.randn(2, 1, 8, 8, 16))  # moves the running statistics
    digest = save_network(
        tmp_path / "m.safetensors", model, task={"name": "t"}, parents=["p"], settings={"lr": 1.0}, note="n"
    )
    again, checkpoint = load_network(tmp_path / "m.safetensors")
    assert not again.training
    assert config_of(again) == config_of(model)
    images = torch.randn(1, 1, 8, 8, 16)
    with torch.no_grad():
        assert torch.equal(again(images), model.eval()(images))
    assert checkpoint.sha256 == digest
    found = {key: checkpoint.metadata[key] for key in ("kind", "task", "parents", "settings", "note")}
    assert found == {
        "kind": "network",
        "task": {"name": "t"},
        "parents": ["p"],
        "settings": {"lr": 1.0},
        "note": "n",
    }


def test_doubly_registered_tensors_are_written_once(tmp_path):
    model = _network("monai.DynUNet")
    save_network(tmp_path / "m.safetensors", model)
    _, checkpoint = load_network(tmp_path / "m.safetensors")
    assert len(checkpoint.tensors) == len(list(model.parameters())) < len(model.state_dict())


def test_checkpoint_of_another_program(tmp_path):
    model = _network("monai.DynUNet", seed=1)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "m.pt")
    with pytest.raises(
        InputError,
        match=r"m.pt: expected a network whose file says how .*load_network\(FILE, network=",
    ):
        load_network(tmp_path / "m.pt")
    again, _ = load_network(tmp_path / "m.pt", network=config_of(model))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_every_differing_tensor_is_listed(tmp_path):
    model = _network(out_channels=2)
    save_network(tmp_path / "m.safetensors", model)
    other = config_of(_network(out_channels=3))
    with pytest.raises(
        InputError, match=r"(?s)2 that differ.*heads\.0\.weight: .*heads\.0\.bias: expected \[3\] .*got \[2\]"
    ):
        load_network(tmp_path / "m.safetensors", network=other)


def test_fisher_file_is_refused(tmp_path):
    save_checkpoint(tmp_path / "f.safetensors", {"a": torch.ones(1)}, kind="fisher")
    with pytest.raises(InputError, match=r"expected a network or merged checkpoint \(got fisher\)"):
        load_network(tmp_path / "f.safetensors")


def test_foreign_module_cannot_be_saved(tmp_path):
    with pytest.raises(InputError, match="expected a model made by build_network"):
        save_network(tmp_path / "m.safetensors", nn.Conv3d(1, 1, 1))
    assert not list(tmp_path.iterdir())
