"""A file that names a network much larger than itself is refused before that network is built."""

import subprocess
import sys

import pytest
import torch

from timm_ext.checkpoint import save_checkpoint
from timm_ext.errors import InputError
from timm_ext.networks import build_network, load_network
from timm_ext.networks.outline import TooLargeError, outline_network
from timm_ext.storage.metadata import NetworkConfig

LARGE = {
    "wide": ("isensee2017", {"base_filters": 3000}),
    "deep": ("isensee2017", {"base_filters": 4, "levels": 14}),
    "deepest": ("isensee2017", {"levels": 10**9}),
    "UNet": ("monai.UNet", {"channels": [4096, 8192], "strides": [2]}),
    "DynUNet": ("monai.DynUNet", {"filters": [4000, 4000, 4000, 4000, 4000]}),
    "SegResNet": ("monai.SegResNet", {"init_filters": 2048}),
    "SwinUNETR": ("monai.SwinUNETR", {"feature_size": 1200}),
    "UNETR": ("monai.UNETR", {"img_size": [96, 96, 96], "hidden_size": 12000, "num_heads": 12}),
}
PEAK = """
import resource, sys
from timm_ext.errors import InputError
from timm_ext.networks import load_network, network_spec
network_spec("monai.UNet")
for path in sys.argv[1:]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        load_network(path)
    except InputError as error:
        message = str(error)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, message)
"""


def test_a_small_file_of_a_large_network_takes_no_memory(tmp_path):
    paths = []
    for case, (name, options) in LARGE.items():
        paths.append(tmp_path / f"{case}.safetensors")
        network = {"name": name, "in_channels": 1, "out_channels": 2, "options": options}
        save_checkpoint(paths[-1], {"w": torch.zeros(30_000)}, kind="network", network=network)
    command = [sys.executable, "-c", PEAK, *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    lines = done.stdout.splitlines()
    assert len(lines) == len(paths)
    for path, line in zip(paths, lines, strict=True):
        megabytes, _, message = line.partition(" ")
        told = message.removeprefix(f"{path}: ")
        assert told.startswith(("network: ", "isensee2017: ", "expected tensors of 120000 bytes"))
        assert int(megabytes) < 300


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("isensee2017", {"base_filters": 8, "levels": 4}),
        ("monai.UNet", {}),
        ("monai.DynUNet", {}),
        ("monai.SegResNet", {}),
        ("monai.AttentionUnet", {}),
        ("monai.BasicUNet", {}),
        ("monai.SwinUNETR", {"feature_size": 12}),
    ],
)
def test_an_outline_has_the_names_and_shapes_of_the_network(name, options):
    config = NetworkConfig(name, 1, 2, options)
    outline = outline_network(config, most_bytes=10**10, most_tensors=10**6)
    built = build_network(name, in_channels=1, out_channels=2, **options)
    found, expected = (
        {key: (tensor.shape, tensor.dtype) for key, tensor in model.state_dict().items()}
        for model in (outline, built)
    )
    assert found == expected


def test_bounds_of_an_outline():
    config = NetworkConfig("isensee2017", 1, 2, {"base_filters": 8, "levels": 4})
    with pytest.raises(TooLargeError):
        outline_network(config, most_bytes=1000, most_tensors=10**6)
    with pytest.raises(TooLargeError):
        outline_network(config, most_bytes=10**9, most_tensors=10)
    with pytest.raises(InputError, match="cannot be built"):
        outline_network(NetworkConfig("isensee2017", 1, 2, {"x": 1}), most_bytes=10**9, most_tensors=10**6)


def test_the_networks_that_fit_are_loaded_by_any_description(tmp_path):
    model = build_network("monai.SwinUNETR", in_channels=1, out_channels=2, feature_size=12, seed=1)
    torch.save(model.state_dict(), tmp_path / "x.pt")
    options = {"feature_size": 12}
    network = {"name": "monai.SwinUNETR", "in_channels": 1, "out_channels": 2, "options": options}
    again, _ = load_network(tmp_path / "x.pt", network=network)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
