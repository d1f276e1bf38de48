"""What training cases decide of a start, and what a run that goes on keeps of it."""

import copy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from timm_ext.checkpoint import load_checkpoint, save_checkpoint
from timm_ext.errors import InputError
from timm_ext.merging.merge import SCRATCH
from timm_ext.training.callbacks import Callback
from timm_ext.training.examples import Data
from timm_ext.transfer import settle
from timm_ext.transfer.head import FittedHead, fit_head
from timm_ext.transfer.run import run
from timm_ext.transfer.session import Session
from timm_ext.transfer.settings import Recipe
from timm_ext.transfer.settle import NOTE_NAME, settled
from timm_ext.transfer.start import Start, split_by

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from examples_for_tests import Blobs, run_in_two_processes, settings, small_network
from merges_for_tests import merged_model

DATA = Data(Blobs(3), Blobs(2, first=50))


def session(folder, steps, **changes):
    return Session(DATA, settings(steps=steps, **changes), folder)


def start(kind, **options):
    merged, split, _ = merged_model()
    return Start(merged.fold() if kind == "plain" else merged, split, **options)


def of_three(**seeds):
    """Three networks to choose from, the second of the highest evidence unless seeds say otherwise."""
    networks = {name: small_network(seed) for name, seed in ({"a": 1, "b": 2, "c": 3} | seeds).items()}
    first = next(iter(networks.values()))
    return Start(first, split_by(first, SCRATCH, Recipe()), alternatives=networks)


def same(one, other):
    values = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in values)


@pytest.mark.parametrize("kind", ["merged", "plain"])
def test_heads_are_fitted_before_the_first_step(tmp_path, kind):
    """And once: what a run would begin with is what fits the cases, whatever follows."""
    begun = start(kind, fit_heads=True)
    network = begun.model.fold() if kind == "merged" else begun.model
    head = fit_head(network, DATA.train, settings())
    done = settled(begun, session(tmp_path, 1))
    plain = done.model.fold() if kind == "merged" else done.model
    assert all(torch.equal(plain.get_parameter(name), value) for name, value in head.tensors.items())
    assert (done.evidence, done.taken) == ({"start": head.evidence}, "start")
    assert settled(done, session(tmp_path, 1)) is done
    given = start(kind)
    assert settled(given, session(tmp_path, 1)) is given
    trained = run(start(kind, fit_heads=True), adaptation=session(tmp_path / "a", 1), tuning=None)
    assert trained.start.evidence == done.evidence


def test_the_source_of_the_highest_evidence_is_taken(tmp_path):
    """Of two equal ones the first; it begins with the heads that were fitted to it."""
    networks = [small_network(seed) for seed in (1, 2, 3)]
    fits = {network: fit_head(network, DATA.train, settings()) for network in networks}
    worst, other, best = sorted(networks, key=lambda network: fits[network].evidence)
    assert fits[best].evidence > fits[other].evidence
    begun = Start(worst, alternatives={"a": worst, "b": best, "c": copy.deepcopy(best)})
    done = settled(begun, session(tmp_path, 1))
    assert done.model is best
    assert done.taken == "b"
    assert done.evidence["a"] == fits[worst].evidence < done.evidence["b"] == done.evidence["c"]
    assert all(torch.equal(best.get_parameter(name), value) for name, value in fits[best].tensors.items())
    assert run(begun, tuning=session(tmp_path / "run", 1)).network is best


class Cut(Callback):
    """Ends a run amid its steps."""

    def __init__(self, step):
        self.step = step

    def on_step(self, step, loss):
        if step == self.step:
            raise InputError("cut")


def unlike(network, examples, chosen):
    """Return heads and an evidence that a fit on another machine might not give."""
    found = fit_head(network, examples, chosen)
    return FittedHead({name: tensor + 1 for name, tensor in found.tensors.items()}, -found.evidence)


@pytest.mark.parametrize("half", ["adaptation", "tuning"])
def test_a_run_that_goes_on_keeps_its_heads_and_its_source(tmp_path, half, monkeypatch):
    """Bit for bit that of a run that was not disturbed, even where a fit would now decide otherwise."""
    kept = {"save_every": 1, "keep": "last"}
    whole = run(of_three(), **{half: session(tmp_path / "whole", 4, **kept)})
    broken = session(tmp_path / "cut", 4, **kept)
    with pytest.raises(InputError, match="cut"):
        run(of_three(), **{half: replace(broken, callbacks=[Cut(3)])})
    monkeypatch.setattr(settle, "fit_head", unlike)
    rest = run(of_three(), **{half: replace(broken, resume=True)})
    assert same(rest.network, whole.network)
    assert rest.histories[0].rows == whole.histories[0].rows
    assert (rest.start.taken, rest.start.evidence) == (whole.start.taken, whole.start.evidence)
    assert settled(of_three(), session(tmp_path / "new", 4)).taken != whole.start.taken


def test_a_run_that_never_took_a_step_begins_anew(tmp_path):
    """What is noted of it may be of other cases."""
    first = settled(of_three(), session(tmp_path, 1))
    again = Session(Data(Blobs(3, first=7)), settings(steps=1), tmp_path, resume=True)
    second = settled(of_three(), again)
    assert second.evidence != first.evidence
    noted = load_checkpoint(tmp_path / NOTE_NAME, kind="start").metadata
    assert (noted["evidence"], noted["taken"]) == (dict(second.evidence), second.taken)


def test_another_run_is_left_as_it_is(tmp_path):
    run(of_three(), tuning=session(tmp_path, 1))
    before = (tmp_path / NOTE_NAME).read_bytes()
    with pytest.raises(InputError, match="expected a folder without a run"):
        run(of_three(a=4), tuning=session(tmp_path, 1))
    assert (tmp_path / NOTE_NAME).read_bytes() == before


def test_notes_that_do_not_fit_the_run_are_refused(tmp_path):
    run(of_three(), tuning=session(tmp_path, 1))
    goes_on, note = replace(session(tmp_path, 1), resume=True), tmp_path / NOTE_NAME
    two = of_three()
    two = replace(two, alternatives={name: two.alternatives[name] for name in ("a", "b")})
    with pytest.raises(InputError, match=r"expected a choice among a, b \(got [abc] of a, b, c\)"):
        settled(two, goes_on)
    evidence = dict.fromkeys("abc", -0.5)
    save_checkpoint(note, {"heads.0.weight": torch.ones(3)}, kind="start", evidence=evidence, taken="a")
    with pytest.raises(InputError, match=r"expected heads of this network \(got others: heads.0.weight\)"):
        settled(of_three(), goes_on)
    note.unlink()
    with pytest.raises(InputError, match=r"expected the heads and the choice that the run began with"):
        settled(of_three(), goes_on)


PROGRAM = """
import sys
sys.path[:0] = {paths!r}
import torch
from examples_for_tests import settings
from test_settle import DATA, of_three
from timm_ext.transfer.run import run
from timm_ext.transfer.session import Session

chosen = settings(steps={steps}, batch_size=2, keep="last")
done = run(of_three(), tuning=Session(DATA, chosen, {run!r}, resume=True))
rank = torch.distributed.get_rank()
torch.save((done.start.taken, dict(done.start.evidence), done.network.state_dict()), {out!r} + str(rank))
"""


@pytest.mark.slow
def test_two_processes_decide_once(tmp_path):
    """One of them notes what both have found, and both read it where the run goes on."""
    tests = Path(__file__).parents[1]
    paths = [str(tests / name) for name in ("transfer", "training", ".")]
    program, note = tmp_path / "program.py", tmp_path / "run" / NOTE_NAME
    values = {"paths": paths, "run": str(tmp_path / "run"), "out": str(tmp_path / "rank")}
    program.write_text(PROGRAM.format(steps=2, **values))
    run_in_two_processes(program)
    noted = note.read_bytes()
    program.write_text(PROGRAM.format(steps=4, **values))
    run_in_two_processes(program)
    assert note.read_bytes() == noted
    one, two = (torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in (0, 1))
    metadata = load_checkpoint(note).metadata
    assert one[:2] == two[:2] == (metadata["taken"], metadata["evidence"])
    assert all(torch.equal(value, two[2][name]) for name, value in one[2].items())
