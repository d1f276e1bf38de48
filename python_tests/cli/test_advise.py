"""Fitted heads on the command line: advice, the best source by evidence, and a merge with fitted heads."""

import json

import torch
from cli_cases import NETWORK, TRAIN, failure, sources

from timm_ext.checkpoint import load_checkpoint
from timm_ext.cli import run
from timm_ext.cli.session import facts_of_run
from timm_ext.config import RunSettings
from timm_ext.networks.io import load_network
from timm_ext.transfer import settle
from timm_ext.transfer.advice import Candidate
from timm_ext.transfer.settings import Recipe

WHOLE = ["--set", "prepare.spacing=8", "--set", "train.patch=whole"]


def test_advise_ranks_sources_their_mean_and_scratch(place, capsys):
    arguments = ["advise", *sources(place), "--data", str(place / "tumours"), "--set", "prepare.spacing=8"]
    assert run([*arguments, "--task", "brats"]) == 0
    told = capsys.readouterr().out
    for text in ("Heads fitted to 2 cases", "M1", "M2", "mean of all", "scratch", "source by evidence: M"):
        assert text in told
    assert "too few cases to tell" in told
    assert "over 2 cases" in told


def test_adapt_takes_the_best_source_by_evidence(place, tmp_path, capsys):
    out = tmp_path / "best"
    arguments = ["adapt", *sources(place), "--data", str(place / "tumours"), "--task", "brats"]
    assert run([*arguments, *WHOLE, "--method", "best-by-evidence", "--out", str(out)]) == 0
    found = load_checkpoint(out / "network.safetensors").metadata["merge"]["evidence"]
    found = json.loads(found) if isinstance(found, str) else found
    best = max(found, key=found.get)
    assert f"{best} taken; heads fitted, log evidence per voxel M1 " in capsys.readouterr().out
    network, source = (
        load_network(path)[0] for path in (out / "network.safetensors", place / f"{best}.safetensors")
    )
    name = "encoder.1.entry.conv.weight"
    assert torch.equal(network.get_parameter(name), source.get_parameter(name))


def test_adapt_fits_the_heads_of_a_merge(place, tmp_path, capsys):
    arguments = ["adapt", *sources(place), "--data", str(place / "tumours"), "--task", "brats"]
    arguments += [*WHOLE, "--method", "mean-imm", "--no-align", "--out"]
    assert "or --set merge.head=fitted" in failure(capsys, [*arguments, tmp_path / "refused"])
    assert run([*arguments, str(tmp_path / "made"), "--set", "train.head=fitted"]) == 0
    evidence = load_checkpoint(tmp_path / "made" / "network.safetensors").metadata["merge"]["evidence"]
    assert list(evidence) == ["start"]


def test_all_cases_are_fitted_to_where_no_step_is_taken(place, tmp_path, capsys, monkeypatch):
    counts, fit = [], settle.fit_head
    monkeypatch.setattr(settle, "fit_head", lambda *given: (counts.append(len(given[1])), fit(*given))[1])
    arguments = ["adapt", *sources(place), "--data", str(place / "tumours"), "--task", "brats", *WHOLE]
    fitted = [*arguments, "--no-align", "--set", "merge.head=fitted", "--val-share", "0.5"]
    assert run([*fitted, "--method", "mean-imm", "--out", str(tmp_path / "mean")]) == 0
    assert run([*fitted, *TRAIN, "--method", "medmerge", "--out", str(tmp_path / "learned")]) == 0
    assert counts == [2, 1]
    refused = [*fitted, "--method", "mean-imm", "--val", place / "tumours", "--out", tmp_path / "none"]
    assert "--val: expected none for mean-imm, which takes no step" in failure(capsys, refused)


def test_a_merge_without_cases_refuses_to_fit_heads(place, tmp_path, capsys):
    arguments = ["merge", *sources(place), "--method", "mean-imm", "--set", "merge.head=fitted", "--out"]
    assert "merge.head: expected given" in failure(capsys, [*arguments, tmp_path / "m.safetensors"])


def test_a_fitted_head_is_noted_by_a_training(place, tmp_path):
    arguments = ["train", str(place / "tumours"), *NETWORK, *WHOLE, *TRAIN, "--set", "merge.head=fitted"]
    assert run([*arguments, "--set", "train.batch_size=1", "--val-share", "0", "--out", str(tmp_path)]) == 0
    noted = load_checkpoint(tmp_path / "network.safetensors").metadata
    assert noted["start"]["evidence"].keys() == {"start"}
    assert noted["settings"]["merge"]["head"] == "fitted"


def test_runs_from_before_heads_could_be_fitted_go_on():
    facts = facts_of_run(RunSettings(), [])
    assert "merge.seed" in facts
    assert "merge.head" not in facts
    assert facts_of_run(RunSettings(merge=Recipe(head="fitted")), [])["merge.head"] == "fitted"


def test_advise_obeys_the_patch_and_aligns_as_adapt_does(place, capsys, monkeypatch):
    seen = []

    def examined(starts, cases, task, settings):
        seen.append((starts, settings))
        return [Candidate(name, -0.1, (0.5, 0.5), 1.0) for name in starts]

    monkeypatch.setattr("timm_ext.transfer.advice.examined", examined)
    arguments = ["advise", *sources(place), "--data", str(place / "tumours"), "--set", "prepare.spacing=8"]
    assert run([*arguments, "--set", "train.patch=[8,8,16]"]) == 0
    told = capsys.readouterr().out
    assert "M2: of another initialisation than M1; channels are brought into one order first" in told
    assert "channels aligned, ratios per kernel (--method medmerge-aligned)" in told
    assert run(["advise", *sources(place)[:1] * 2, *arguments[3:]]) == 0
    assert "no alignment, ratios per kernel (--method medmerge)" in capsys.readouterr().out
    (apart, given), (_, default) = seen
    assert (given.patch, default.patch) == ((8, 8, 16), None)
    assert list(apart) == ["M1", "M2", "mean of all", "scratch"]
    name = "encoder.1.entry.conv.weight"
    one, two = (load_network(path)[0].get_parameter(name) for path in sources(place))
    mean = apart["mean of all"].get_parameter(name)
    assert torch.equal(apart["M2"].get_parameter(name), two)
    assert not torch.allclose(mean, (one + two) / 2)  # channels of the second are in another order


def test_advise_says_which_channels_a_source_never_saw(place, capsys, tmp_path):
    task = tmp_path / "t1c.yaml"
    task.write_text(
        "name: core\nmodalities: [T1c]\nregions: {core: [1, 4]}\nlabels: [0, 1, 2, 4]\n", encoding="utf-8"
    )
    arguments = ["advise", *sources(place), "--data", str(place / "tumours"), "--set", "prepare.spacing=8"]
    assert run([*arguments, "--task", str(task)]) == 0
    told = capsys.readouterr().out
    assert "M1 never saw T1c: there the first layer starts with the new network's own weights" in told


def test_advise_names_the_default_task_where_cases_do_not_fit_it(place, capsys):
    error = failure(capsys, ["advise", *sources(place), "--data", place / "brains"])
    assert "brats is the default; --task names another" in error
