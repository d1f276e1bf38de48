"""Networks of benchmarks: the same each time, without chance, from four images to three maps of logits."""

import pytest
import torch

from benchmarks import fisher, inference, networks, train_step, trainers

NNUNET = ("PlainConvUNet", "ResidualEncoderUNet")


def build(name):
    if name.startswith(NNUNET):
        pytest.importorskip("dynamic_network_architectures")
    return networks.NETWORKS[name]()


@pytest.mark.parametrize("name", ["isensee2017 8", "AttentionUnet 16-128"])
def test_a_network_is_the_same_each_time_and_leaves_global_random_numbers_alone(name):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    one, other = build(name), build(name)
    assert torch.equal(torch.rand(3), expected)
    assert one.training
    for mine, theirs in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)
    images, _ = networks.draw(1, 32)
    with torch.no_grad():
        assert torch.equal(networks.heads(one(images))[0], networks.heads(one(images))[0])


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_a_network_maps_four_images_to_three_maps(name):
    edge = networks.LEAST_EDGE.get(name, 32)
    with torch.device("cpu" if name.startswith("SwinUNETR") else "meta"):  # it reads a tensor's values
        model = build(name).to("meta")  # shapes alone
    images, labels = networks.draw(1, edge, device="meta")
    found = networks.heads(model(images))
    assert found[0].shape == labels.shape == (1, networks.OUTPUTS, edge, edge, edge)
    assert (len(found) > 1) == ("deep supervision" in name)
    assert [head.shape[2] for head in found] == [edge >> i for i in range(len(found))]


def test_images_and_labels_are_the_same_for_any_type():
    images, labels = networks.draw(2, 8)
    doubles, double_labels = networks.draw(2, 8, torch.float64)
    assert doubles.dtype == double_labels.dtype == torch.float64
    assert torch.equal(images.double(), doubles)
    assert torch.equal(labels.double(), double_labels)
    assert labels.unique().tolist() == [0, 1]


@pytest.mark.parametrize("module", [fisher, inference, train_step, trainers])
def test_an_edge_that_a_network_does_not_take_is_one_line(module, tmp_path):
    with pytest.raises(
        SystemExit, match=r"^isensee2017 8: expected images that it takes \(got an edge of 40: "
    ):
        module.main([str(tmp_path / "result.json"), "--network", "isensee2017 8", "--edge", "40"])
    assert not list(tmp_path.iterdir())
