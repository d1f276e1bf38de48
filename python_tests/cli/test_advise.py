"""Fitted heads on the command line: advice, the best source by evidence, and a merge with fitted heads."""

import json

import torch
from cli_cases import failure, sources

from timm_ext.checkpoint import load_checkpoint
from timm_ext.cli import run
from timm_ext.networks.io import load_network

WHOLE = ["--set", "prepare.spacing=8", "--set", "train.patch=whole", "--val-share", "0"]


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
    assert "or --set train.head=fitted" in failure(capsys, [*arguments, tmp_path / "refused"])
    assert run([*arguments, str(tmp_path / "made"), "--set", "train.head=fitted"]) == 0
    evidence = load_checkpoint(tmp_path / "made" / "network.safetensors").metadata["merge"]["evidence"]
    assert list(evidence) == ["start"]


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
