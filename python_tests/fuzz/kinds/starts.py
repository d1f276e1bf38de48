"""What a run notes of its start, read when it is resumed."""

import functools
import random
import shutil
import sys
from pathlib import Path

import torch
from fuzz import Outcome, kind, mutate, scratch

sys.path.insert(0, str(Path(__file__).parents[2] / "training"))
from examples_for_tests import Blobs, settings, small_network

from timm_ext.checkpoint import load_checkpoint, save_checkpoint
from timm_ext.training.examples import Data
from timm_ext.training.state import STATE_NAME
from timm_ext.transfer.session import Session
from timm_ext.transfer.settle import NOTE_NAME, settled
from timm_ext.transfer.start import Start


def settle(folder: Path) -> tuple[object, ...]:
    """Decide, or read what was decided; return the evidence, the choice and the network's weights."""
    networks = {name: small_network(seed) for seed, name in enumerate("ab")}
    session = Session(Data(Blobs(2)), settings(), folder, resume=True)
    done = settled(Start(networks["a"], alternatives=networks), session)
    weights = torch.cat([value.flatten() for value in done.model.state_dict().values()])
    return dict(done.evidence), done.taken, weights.numpy().tobytes()


@functools.cache
def begun() -> tuple[Path, tuple[object, ...]]:
    """A folder in which a run has begun, and what was decided there."""
    folder = scratch() / "start"
    decided = settle(folder)
    (folder / STATE_NAME).touch()
    return folder, decided


@kind("start-bytes")
def damaged_note(rng: random.Random, folder: Path) -> Outcome:
    """Flipped bits, lost and added bytes."""
    before, decided = begun()
    shutil.copytree(before, folder / "run")
    note = folder / "run" / NOTE_NAME
    note.write_bytes(mutate.damaged(rng, note.read_bytes()))
    assert settle(note.parent) == decided, "another start from a damaged file"
    return Outcome.SAME


@kind("start-content")
def other_content(rng: random.Random, folder: Path) -> Outcome:
    """Other content under a digest that is right: refused, or a start of these candidates."""
    shutil.copytree(begun()[0], folder / "run")
    note = load_checkpoint(folder / "run" / NOTE_NAME)
    facts = {name: note.metadata[name] for name in ("evidence", "taken")}
    tensors = dict(note.tensors)
    if rng.randrange(2):
        facts = mutate.damaged_tree(rng, facts)
    else:
        name = rng.choice(sorted(tensors))
        tensors[rng.choice([name, "other"])] = rng.choice(
            [tensors[name][None], tensors[name].flatten()[:1], tensors[name].double(), torch.empty(0)]
        )
    try:
        save_checkpoint(folder / "run" / NOTE_NAME, tensors, kind="start", **facts)
    except (TypeError, ValueError, RecursionError, OverflowError, UnicodeError):
        return Outcome.SAME  # nothing that could stand in a file
    assert settle(folder / "run")[1] in ("a", "b")
    return Outcome.RIGHT
