"""What files of tensors say about themselves is checked when they are read and written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from timm_ext.checkpoint import load_checkpoint, save_checkpoint
from timm_ext.errors import InputError
from timm_ext.networks import load_network
from timm_ext.storage.metadata import network_config, read_metadata

NETWORK: dict[str, Any] = {
    "name": "isensee2017",
    "in_channels": 1,
    "out_channels": 2,
    "options": {"levels": 2},
}


def write(path: Path, **metadata: Any) -> Path:
    """A file of another writer with metadata under our name."""
    about = {"kind": "network", **metadata}
    save_file({"w": torch.ones(1)}, path, metadata={"timm_ext": json.dumps(about)})
    return path


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"network": NETWORK | {"in_channels": float("inf")}}, "Infinity, which is no number in JSON"),
        ({"network": NETWORK | {"in_channels": 1e30}}, "in_channels: expected a valid integer"),
        ({"network": NETWORK | {"in_channels": "2"}}, "in_channels: expected a valid integer"),
        ({"network": NETWORK | {"in_channels": True}}, "in_channels: expected a valid integer"),
        ({"network": NETWORK | {"in_channels": 0}}, "expected in_channels from 1 to 65536"),
        ({"network": NETWORK | {"out_channels": 10**50}}, "expected out_channels from 1 to|valid integer"),
        ({"network": NETWORK | {"name": ["isensee2017"]}}, "name: expected a valid string"),
        ({"network": NETWORK | {"name": "x" * 1000}}, "expected a name of 1 to 200 characters"),
        ({"network": NETWORK | {"options": [1]}}, "options: expected named fields"),
        ({"network": NETWORK | {"options": {"seed": 1}}}, r"options of the network's own \(got seed\)"),
        ({"network": NETWORK | {"more": 1}}, "unknown field network.more"),
        ({"network": {"name": "isensee2017"}}, "in_channels"),
        ({"network": "isensee2017"}, "network"),
        ({"kind": ["network"]}, "kind: expected a valid string"),
        ({"versions": {"torch": 2}}, "versions.torch: expected a valid string"),
        ({"task": ["brats"]}, "task: expected named fields"),
        ({"parents": "x"}, "parents: expected a valid array"),
        ({"parents": [1]}, "parents.0: expected a valid string"),
        ({"settings": 3}, "settings: expected named fields"),
        ({"aliases": {"a": 1}}, "aliases.a: expected a valid string"),
        ({"digest": 3}, "digest: expected a valid string"),
        ({"format": "2"}, "format: expected a valid integer"),
        ({"format": 2}, "a digest in its metadata"),
        ({"note": json.loads("[" * 70 + "]" * 70)}, "expected JSON of at most 64 levels"),
    ],
)
def test_wrong_metadata_are_one_line(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "x.safetensors", **metadata)
    for load in (load_checkpoint, load_network):
        with pytest.raises(InputError, match=rf"x.safetensors: expected .*({message})") as error:
            load(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{" * 5000, '{"kind": "a", "kind": "b"}', "3", '{"kind": "\\ud800"}'])
def test_texts_that_are_no_metadata(text: str) -> None:
    with pytest.raises(InputError, match="x: expected metadata written by timm_ext"):
        read_metadata(text, "x")


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, object()])
def test_metadata_that_could_not_be_read_are_not_written(tmp_path: Path, value: object) -> None:
    with pytest.raises(InputError, match="x: expected metadata of JSON values"):
        save_checkpoint(tmp_path / "x", {"w": torch.ones(1)}, kind="network", note=value)
    with pytest.raises(InputError, match="network"):
        save_checkpoint(tmp_path / "x", {"w": torch.ones(1)}, kind="network", network={"name": 3})
    assert not list(tmp_path.iterdir())


def test_a_network_that_a_caller_describes() -> None:
    assert network_config(NETWORK, "network").options == {"levels": 2}
    with pytest.raises(InputError, match=r"network: expected a description of a network.*out_channels"):
        network_config({"name": "isensee2017", "in_channels": 1}, "network")
