"""Fisher files, interrupted estimates and their metadata; odd input of an update."""

import functools
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzz import Outcome, kind, mutate, scratch
from torch import Tensor, nn

from timm_ext.checkpoint import load_checkpoint, save_checkpoint
from timm_ext.fisher import Fisher, FisherAccumulator, FisherKind, estimate_fisher

IDS = [f"case{number}" for number in range(6)]
X = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, :1] > 0).float()


@functools.cache
def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.InstanceNorm2d(3, affine=True), nn.Conv2d(3, 1, 1)
        )


def batches() -> list[Any]:
    return [(X[n : n + 2], Y[n : n + 2], IDS[n : n + 2]) for n in range(0, 6, 2)]


def estimate(data: Any, **options: Any) -> Fisher:
    return estimate_fisher(network(), data, labels="true", **options)


@functools.cache
def fisher_file() -> Path:
    path = scratch() / "fisher.safetensors"
    estimate(batches()).save(path, network_sha256="ab" * 32, task={"name": "brats"}, settings={"seed": 0})
    return path


@functools.cache
def partial_file() -> Path:
    """What an estimate leaves that is interrupted after four of six examples."""
    path = scratch() / "partial"

    def interrupted() -> Any:
        yield from batches()[:2]
        raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        estimate(interrupted(), partial=path)
    assert path.exists()
    return path


@functools.cache
def expected() -> Fisher:
    return estimate(batches())


def check_form(fisher: Fisher) -> None:
    """Whatever a file held, what comes of it is a Fisher by its types and values."""
    assert isinstance(fisher.kind, FisherKind)
    assert type(fisher.count) is int
    assert fisher.count >= 1
    assert type(fisher.samples) is int
    assert type(fisher.scaling) is str
    assert fisher.seed is None or type(fisher.seed) is int
    assert isinstance(fisher.metadata, dict)
    assert {*fisher.zero, *fisher.unused} <= fisher.tensors.keys()
    for tensor in fisher.tensors.values():
        assert tensor.is_floating_point()
        assert bool((tensor >= 0).all())


def same(one: Fisher, other: Fisher) -> bool:
    return vars(one) | {"tensors": None} == vars(other) | {"tensors": None} and (
        one.tensors.keys() == other.tensors.keys()
        and all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())
    )


@kind("fisher-bytes")
def damaged_fisher(rng: random.Random, folder: Path) -> Outcome:
    path = folder / "fisher.safetensors"
    path.write_bytes(mutate.damaged(rng, fisher_file().read_bytes()))
    assert same(Fisher.load(path), Fisher.load(fisher_file()))
    return Outcome.SAME


@kind("fisher-partial-bytes")
def damaged_partial(rng: random.Random, folder: Path) -> Outcome:
    path = folder / "partial"
    path.write_bytes(mutate.damaged(rng, partial_file().read_bytes()))
    assert same(estimate(batches(), partial=path), expected())
    return Outcome.SAME


def rewritten(rng: random.Random, source: Path, path: Path) -> None:
    """Write a file again, whole, with other metadata, and now and then with other tensors."""
    checkpoint = load_checkpoint(source)
    metadata = {key: value for key, value in checkpoint.metadata.items() if key not in ("kind", "versions")}
    changed = mutate.damaged_tree(rng, metadata)
    tensors = dict(checkpoint.tensors)
    if rng.random() < 0.3:
        odd_tensor(rng, tensors)
    fields = {str(key): value for key, value in changed.items()} if isinstance(changed, dict) else {}
    fields = {key: value for key, value in fields.items() if key not in ("path", "tensors", "kind")}
    save_checkpoint(path, tensors, kind=checkpoint.kind, **fields)


def odd_tensor(rng: random.Random, tensors: dict[str, Tensor]) -> None:
    name = rng.choice(list(tensors))
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda tensor: tensor.double(),
        lambda tensor: tensor.half(),
        lambda tensor: tensor.to(torch.int64),
        lambda tensor: tensor > 0,
        lambda tensor: tensor * float("nan"),
        lambda tensor: tensor * float("inf"),
        lambda tensor: -1 - tensor,
        lambda tensor: tensor.flatten()[:1],
        lambda tensor: tensor[None],
        lambda tensor: tensor.flatten()[:0],
        lambda tensor: tensor.to(torch.float8_e4m3fn),
        lambda tensor: tensor.to(torch.complex64),
    ]
    changed = rng.choice(changes)(tensors.pop(name))
    if rng.random() < 0.8:
        tensors[name if rng.random() < 0.8 else rng.choice(["other", *tensors])] = changed


@kind("fisher-metadata")
def foreign_fisher(rng: random.Random, folder: Path) -> Outcome:
    path = folder / "fisher.safetensors"
    rewritten(rng, fisher_file(), path)
    check_form(Fisher.load(path))
    return Outcome.RIGHT


@kind("fisher-partial-metadata")
def foreign_partial(rng: random.Random, folder: Path) -> Outcome:
    path = folder / "partial"
    rewritten(rng, partial_file(), path)
    check_form(estimate(batches(), partial=path))
    return Outcome.RIGHT


def odd_images(rng: random.Random) -> Any:
    return rng.choice(
        [
            lambda: X.numpy(),
            lambda: X.tolist(),
            lambda: X[0],
            lambda: X[:, 0],
            lambda: X[:, :1],
            lambda: X.double(),
            lambda: X.int(),
            lambda: X > 0,
            lambda: X.to("meta"),
            lambda: X.to_sparse(),
            lambda: X.to(torch.complex64),
            lambda: X * float("nan"),
            lambda: X[:0],
            lambda: X[..., None],
            lambda: X[..., :0],
            lambda: X.transpose(2, 3),
            lambda: X[:, :, ::2],
            lambda: X.expand(6, 2, 4, 4),
            lambda: X.clone().requires_grad_(),
            lambda: mutate.odd_value(rng),
        ]
    )()


def odd_labels(rng: random.Random) -> Any:
    return rng.choice(
        [
            lambda: Y.numpy(),
            lambda: Y.long(),
            lambda: Y > 0,
            lambda: Y[:1],
            lambda: Y[0],
            lambda: Y * 2,
            lambda: Y * float("nan"),
            lambda: Y[:, 0],
            lambda: torch.tensor(1.0),
            lambda: mutate.odd_value(rng),
        ]
    )()


def odd_ids(rng: random.Random) -> Any:
    return rng.choice(
        [
            lambda: IDS[:2],
            lambda: [*IDS[:-1], IDS[0]],
            lambda: tuple(IDS),
            lambda: np.array(IDS),
            lambda: dict.fromkeys(IDS),
            lambda: (name for name in IDS),
            lambda: [mutate.odd_value(rng) for _ in IDS],
            lambda: [rng.choice(mutate.ODD_NAMES) + str(n) for n in range(6)],
            lambda: torch.arange(6),
            lambda: mutate.odd_value(rng),
        ]
    )()


@kind("fisher-update")
def odd_update(rng: random.Random, folder: Path) -> Outcome:
    x, y, ids = X, Y, IDS
    options: dict[str, Any] = {"labels": "true"}
    for _ in range(rng.randint(1, 2)):
        match rng.randrange(4):
            case 0:
                x = odd_images(rng)
            case 1:
                y = odd_labels(rng)
            case 2:
                ids = odd_ids(rng)
            case _:
                names = ["likelihood", "labels", "samples", "seed", "precision", "micro_batch"]
                options[rng.choice(names)] = mutate.odd_value(rng)
    accumulator = FisherAccumulator(network(), **options)
    with accumulator:
        accumulator.update(x, y, ids)
    fisher = accumulator.result()
    check_form(fisher)
    assert fisher.count == 6
    return Outcome.RIGHT
