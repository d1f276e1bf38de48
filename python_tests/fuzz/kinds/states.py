"""The state and the log of a run that is resumed."""

import functools
import random
import shutil
import sys
from pathlib import Path

import torch
from fuzz import Outcome, kind, mutate, scratch

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))
from examples_for_tests import Blobs, settings, small_network

from timm_ext.training.callbacks import Observe
from timm_ext.training.examples import Data
from timm_ext.training.state import FORMAT, load_state, save_state
from timm_ext.training.trainer import Trainer

BEGUN, STEPS = 4, 6


def train(folder: Path, steps: int) -> bytes:
    """Train, or go on; return the bytes of the weights and of the log."""
    model = small_network()
    chosen = settings(steps=steps, schedule="plateau", validate_every=2)
    Trainer(chosen, folder).fit(
        model,
        Data(Blobs(3), Blobs(2, first=50)),
        callbacks=[Observe(lambda: next(model.parameters()).sum())],
        resume=True,
    )
    weights = torch.cat([value.flatten() for value in model.state_dict().values()])
    return weights.numpy().tobytes() + (folder / "log.csv").read_bytes()


@functools.cache
def begun() -> Path:
    """A run that was stopped in the middle."""
    folder = scratch() / "run"
    train(folder, BEGUN)
    return folder


@functools.cache
def whole() -> bytes:
    """What the run would have become."""
    return train(scratch() / "whole", STEPS)


def copy_of_run(folder: Path) -> Path:
    expected, run = whole(), folder / "run"
    assert expected
    shutil.copytree(begun(), run)
    return run


def resumed(run: Path) -> Outcome:
    assert train(run, STEPS) == whole(), "another result from a damaged file"
    return Outcome.SAME


@kind("state-bytes", seconds=30)
def damaged_state(rng: random.Random, folder: Path) -> Outcome:
    """Flipped bits, lost and added bytes."""
    path = copy_of_run(folder) / "state.pt"
    path.write_bytes(mutate.damaged(rng, path.read_bytes()))
    return resumed(path.parent)


@kind("state-log", seconds=30)
def damaged_log(rng: random.Random, folder: Path) -> Outcome:
    path = copy_of_run(folder) / "log.csv"
    path.write_bytes(mutate.damaged(rng, path.read_bytes()))
    return resumed(path.parent)


def changed_tensor(rng: random.Random, tensor: torch.Tensor) -> object:
    changed = tensor.clone()
    match rng.randrange(7):
        case 0:
            return changed.double() if changed.is_floating_point() else changed.float()
        case 1:
            return changed[None]
        case 2:
            return changed.flatten()[:1]
        case 3:
            return changed.to_sparse()
        case 4 if changed.numel():
            changed.flatten()[rng.randrange(changed.numel())] = rng.choice([float("nan"), float("inf")])
            return changed
        case 5:
            return -changed - 1
        case _:
            return torch.empty(0)


def tensors_of(tree: object) -> list[tuple[dict, object]]:
    if not isinstance(tree, dict):
        return []
    here = [(tree, key) for key, value in tree.items() if isinstance(value, torch.Tensor)]
    return here + [place for value in tree.values() for place in tensors_of(value)]


def changed_tree(rng: random.Random, run: Path) -> dict:
    tree = load_state(run / "state.pt")
    if rng.randrange(2):
        tree = mutate.damaged_tree(rng, tree)
    else:
        holder, key = rng.choice(tensors_of(tree))
        holder[key] = changed_tensor(rng, holder[key])
    return tree


@kind("state-tree", seconds=30)
def other_content(rng: random.Random, folder: Path) -> Outcome:
    """Other content under a digest that is right: refused, or the run goes on with it."""
    run = copy_of_run(folder)
    tree = changed_tree(rng, run)
    try:
        save_state(run / "state.pt", tree if isinstance(tree, dict) else {"tree": tree})
    except (ValueError, RecursionError, OverflowError, UnicodeError):
        return Outcome.SAME  # nothing that could stand in a file
    train(run, STEPS)
    return Outcome.RIGHT


@kind("state-unsigned", seconds=30)
def content_of_others(rng: random.Random, folder: Path) -> Outcome:
    """Other content in a file that another program wrote: always refused."""
    run = copy_of_run(folder)
    tree = changed_tree(rng, run)
    try:
        torch.save({"format": FORMAT, **tree} if isinstance(tree, dict) else tree, run / "state.pt")
    except (ValueError, RecursionError, OverflowError, UnicodeError):
        return Outcome.SAME
    train(run, STEPS)
    raise AssertionError("a state without a digest was taken")
