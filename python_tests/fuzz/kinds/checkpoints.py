"""Files of tensors: ours and other programs', damaged in their bytes, their headers and their metadata."""

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import torch
from fuzz import Outcome, kind, mutate, scratch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from timm_ext.checkpoint import load_checkpoint, save_checkpoint
from timm_ext.cli.common import task_of
from timm_ext.data.tasks import get_task, task_to_dict
from timm_ext.layout import Layout
from timm_ext.merging.bank import Bank
from timm_ext.merging.streaming.merge import merge_checkpoints
from timm_ext.networks import build_network, load_network, save_network
from timm_ext.parameters import split_parameters

OPTIONS = {"channels": [2, 4], "strides": [2], "num_res_units": 1, "norm": "batch"}
NETWORK = {"name": "monai.UNet", "in_channels": 2, "out_channels": 7, "options": OPTIONS}
PARTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
RECORDS = ("state_dict", "model", "network", "net", "network_weights", "module", "model_state_dict", "ema")
FRONTS = ("module.", "model.", "net.", "_model.", "segmenter.network.", "ema_model.", "")


@cache
def model() -> torch.nn.Module:
    """A network with batch norms whose tensors begin with `model.`."""
    return build_network("monai.UNet", in_channels=2, out_channels=7, seed=1, **OPTIONS)


def state() -> dict[str, Tensor]:
    return dict(model().state_dict())


@cache
def ours() -> bytes:
    path = scratch() / "ours.safetensors"
    save_network(path, model(), task=task_to_dict(get_task("parcellation-1-7")), settings={"prepare": {}})
    return path.read_bytes()


@cache
def metadata() -> dict[str, Any]:
    """What stands in our file, as files without a digest have it."""
    path = scratch() / "facts.safetensors"
    path.write_bytes(ours())
    return load_checkpoint(path).metadata


@cache
def torch_file(*, archive: bool) -> bytes:
    path = scratch() / f"{archive}.pt"
    torch.save({"state_dict": state(), "epoch": 3}, path, _use_new_zipfile_serialization=archive)
    return path.read_bytes()


@cache
def foreign() -> bytes:
    save_file(state(), scratch() / "foreign.safetensors")
    return (scratch() / "foreign.safetensors").read_bytes()


@cache
def bank() -> tuple[dict[str, Tensor], dict[str, Any]]:
    layout = Layout.from_model(model(), split_parameters(model(), heads=[], transfer_norms=True).shared)
    built = Bank.build({"M1": state(), "M2": state()}, None, layout)
    built.save(scratch() / "bank.safetensors")
    found = load_checkpoint(scratch() / "bank.safetensors")
    return found.tensors, found.metadata


def same_tensors(found: dict[str, Tensor]) -> bool:
    return all(torch.equal(found[name], tensor) for name, tensor in state().items())


def without_digest(path: Path, tensors: dict[str, Tensor], about: Any) -> Path:
    save_file(tensors, path, metadata={"timm_ext": json.dumps(about)})
    return path


@kind("network-file", seconds=10, megabytes=300)
def damaged_network(rng: random.Random, folder: Path) -> Outcome:
    path = folder / "x.safetensors"
    path.write_bytes(mutate.damaged(rng, ours()))
    found, checkpoint = load_network(path)
    assert path.read_bytes() == ours(), "damage was not seen"
    assert same_tensors(dict(found.state_dict()))
    assert checkpoint.metadata == metadata()
    return Outcome.SAME


@kind("network-metadata", seconds=10, megabytes=300)
def damaged_metadata(rng: random.Random, folder: Path) -> Outcome:
    path = without_digest(folder / "x.safetensors", state(), mutate.damaged_tree(rng, metadata()))
    found, checkpoint = load_network(path)
    assert same_tensors(dict(found.state_dict()))
    task_of(None, checkpoint)
    return Outcome.RIGHT


@kind("network-options", seconds=10, megabytes=300)
def damaged_options(rng: random.Random, folder: Path) -> Outcome:
    options = mutate.damaged_tree(rng, OPTIONS)
    if rng.random() < 0.3:
        options = OPTIONS | {rng.choice(list(OPTIONS)): rng.choice([[10**6, 10**6], 10**9, [4] * 300])}
    about = metadata() | {"network": NETWORK | {"options": options}}
    found, _ = load_network(without_digest(folder / "x.safetensors", state(), about))
    assert same_tensors(dict(found.state_dict()))
    return Outcome.RIGHT


@kind("foreign-safetensors", seconds=10, megabytes=300)
def damaged_safetensors(rng: random.Random, folder: Path) -> Outcome:
    path = folder / "x.safetensors"
    path.write_bytes(mutate.damaged(rng, foreign()))
    found, _ = load_network(path, network=NETWORK)  # without a checksum, changed numbers cannot be seen
    assert all(tensor.isfinite().all() for tensor in found.state_dict().values())
    return Outcome.SAME


@kind("torch-archive", seconds=10, megabytes=300)
def damaged_archive(rng: random.Random, folder: Path) -> Outcome:
    path = folder / "x.pt"
    path.write_bytes(mutate.damaged(rng, torch_file(archive=True)))
    found, _ = load_network(path, network=NETWORK)
    assert same_tensors(dict(found.state_dict())), "damage was not seen"
    return Outcome.SAME


@kind("torch-pickle", seconds=10, megabytes=300)
def damaged_pickle(rng: random.Random, folder: Path) -> Outcome:
    path = folder / "x.pt"
    path.write_bytes(mutate.damaged(rng, torch_file(archive=False)))
    found, _ = load_network(path, network=NETWORK)
    assert all(tensor.isfinite().all() for tensor in found.state_dict().values())
    return Outcome.SAME


@kind("torch-tree", seconds=10, megabytes=300)
def damaged_record(rng: random.Random, folder: Path) -> Outcome:
    tensors: dict[str, Any] = {"a.weight": torch.ones(2, 3), "a.bias": torch.ones(2), "n": torch.tensor(3)}
    record = {
        "epoch": 3,
        "state_dict": tensors,
        "optimizer": {"state": {0: {"x": torch.ones(2)}}},
        "lr": [0.1],
    }
    torch.save(mutate.damaged_tree(rng, record), folder / "x.pt")
    found = load_checkpoint(folder / "x.pt")
    assert found.tensors
    assert all(isinstance(tensor, Tensor) for tensor in found.tensors.values())
    return Outcome.RIGHT


@kind("safetensors-header", seconds=10, megabytes=300)
def damaged_header(rng: random.Random, folder: Path) -> Outcome:
    """What a streamed merge takes, it writes so that safetensors can open it."""
    data = foreign()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = {"format": "pt"}
    for _ in range(rng.randint(1, 2)):
        name = rng.choice(list(header))
        header[name] = mutate.damaged_tree(rng, header[name], most=1)
    text = json.dumps(header).encode()
    path, out = folder / "x.safetensors", folder / "out.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    merge_checkpoints([path, path], out, ratios=[1, 2], workers=1)
    with safe_open(out, framework="pt") as file, safe_open(path, framework="pt") as source:
        assert set(file.keys()) == set(source.keys())
    load_checkpoint(out)
    return Outcome.RIGHT


@kind("bank-metadata", seconds=10, megabytes=300)
def damaged_bank(rng: random.Random, folder: Path) -> Outcome:
    tensors, about = bank()
    about = {**about, "bank": mutate.damaged_tree(rng, about["bank"])}
    if rng.random() < 0.3:
        tensors = {name: tensor for name, tensor in tensors.items() if rng.random() < 0.9}
    loaded = Bank.load(without_digest(folder / "x.safetensors", tensors, about))
    assert torch.equal(loaded.theta, torch.stack([tensors[f"theta.{t}"] for t in range(len(loaded))]))
    return Outcome.RIGHT


@kind("wrapped-network", seconds=10, megabytes=300)
def wrapped(rng: random.Random, folder: Path) -> Outcome:
    """Whatever is put around a network, it comes out."""
    tensors = state()
    for _ in range(rng.randint(0, 4)):
        front = rng.choice([*FRONTS, *(f"{part}." for part in PARTS)])
        tensors = {front + name: tensor for name, tensor in tensors.items()}
    if rng.random() < 0.3:
        part = rng.choice(PARTS)
        tensors = {f".{part}.".join(name.rsplit(".", 1)): tensor for name, tensor in tensors.items()}
    if rng.random() < 0.3 and not all(name.startswith("model.") for name in tensors):
        tensors["loss.weight"] = torch.ones(3)
    record: Any = tensors
    for _ in range(rng.randint(0, 2)):
        record = {rng.choice(RECORDS): record, "epoch": 3, "optimizer": {"state": {0: {"x": torch.ones(2)}}}}
    if rng.random() < 0.2 and record is tensors:
        save_file(tensors, folder / "x.pt")
    else:
        torch.save(record, folder / "x.pt", _use_new_zipfile_serialization=rng.random() < 0.8)
    found, _ = load_network(folder / "x.pt", network=NETWORK)
    assert same_tensors(dict(found.state_dict()))
    return Outcome.RIGHT


@kind("checkpoint-round-trip", seconds=10, megabytes=300)
def round_trip(rng: random.Random, folder: Path) -> Outcome:
    note = mutate.damaged_tree(rng, metadata())
    save_checkpoint(folder / "x", {"w": torch.ones(3)}, kind="other", note=note)
    assert load_checkpoint(folder / "x").metadata["note"] == json.loads(json.dumps(note))
    return Outcome.RIGHT
