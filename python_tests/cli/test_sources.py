"""Source networks of the commands: read, brought into one order and merged once."""

from collections import Counter
from pathlib import Path

import pytest
from cli_cases import TRAIN, fishers, sources
from torch import nn

from timm_ext.cli import run
from timm_ext.cli.session import evidence_told
from timm_ext.cli.told import tell_unlike_spacing
from timm_ext.config import RunSettings
from timm_ext.data.prepare import PrepareSettings
from timm_ext.interop import networks
from timm_ext.transfer import sources as transfer_sources
from timm_ext.transfer import start
from timm_ext.transfer.settle import OWN


def test_adapt_reads_aligns_and_merges_its_sources_once(place, tmp_path, monkeypatch):
    calls = Counter()

    def counted(module, name):
        function = getattr(module, name)

        def call(*arguments, **options):
            calls[f"{name} {arguments[0]}" if name == "load_checkpoint" else name] += 1
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    counted(networks, "load_checkpoint")
    counted(transfer_sources, "alignments")
    counted(start, "initialise")
    command = ["adapt", *sources(place), *fishers(place), "--data", str(place / "tumours"), "--align"]
    assert run([*command, "--val-share", "0", "--out", str(tmp_path / "run"), *TRAIN]) == 0
    read = {f"load_checkpoint {path}": 1 for path in sources(place)}
    assert calls == {**read, "alignments": 1, "initialise": 1}


@pytest.mark.parametrize(
    ("noted", "own", "told"),
    [
        ([1.0, 1.0, 1.0], 1.0, False),
        (2.0, (2.0, 2.0, 2.0), False),
        ([1.0, 1.0, 2.0], 1.0, True),
        (2.0, None, True),
    ],
)
def test_voxel_sizes_are_compared_however_they_are_written(capsys, noted, own, told):
    settings = RunSettings().model_copy(update={"prepare": PrepareSettings(spacing=own)})
    sources_ = transfer_sources.Sources(("a",), (), (), (), prepared=({"spacing": noted},))
    tell_unlike_spacing(settings, [Path("a")], sources_)
    assert ("a was trained on cases of prepare.spacing" in capsys.readouterr().out) is told


@pytest.mark.parametrize(
    ("alternatives", "told"),
    [
        (("start 2", "b"), "start 2 taken; heads fitted, log evidence per voxel start 2 -0.5"),
        ((), "voxel -0.5000"),
    ],
)
def test_evidence_is_told_by_the_names_of_sources(alternatives, told):
    evidence = dict.fromkeys(alternatives, -0.5) or {OWN: -0.5}
    networks_of = {name: nn.Identity() for name in alternatives}
    begun = start.Start(
        nn.Identity(), alternatives=networks_of, evidence=evidence, taken="".join(alternatives[:1])
    )
    assert told in evidence_told(begun)
