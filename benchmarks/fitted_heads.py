"""Scores fine-tuning from heads that were fitted to the training cases, and from heads at random.

    python -m benchmarks.fitted_heads HIPPOCAMPUS benchmarks/results/fitted_heads.json

HIPPOCAMPUS is Task 04 of the Medical Segmentation Decathlon in nnU-Net's raw layout. A source network learns
the whole hippocampus on some cases; the new network starts from it (`transfer-1`) and learns the anterior and
the posterior part on a few others, all of it trained at a constant rate. Both ways have the same source,
cases, order of the cases and, before a fit, the same heads. A repeat is another division of the cases,
another source network and another seed of all else. The Dice of test cases is taken as training goes on;
nothing is chosen by it.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from timm_ext.data.formats.cases import read_cases, split_cases
from timm_ext.data.prepare import Prepared, PrepareSettings, prepare_cases
from timm_ext.data.tasks import Task, task_from_dict
from timm_ext.files import write_json
from timm_ext.networks import build_network
from timm_ext.system.environment import environment
from timm_ext.training.device import launch
from timm_ext.training.examples import Data
from timm_ext.training.objective import loss_of
from timm_ext.training.settings import TrainSettings
from timm_ext.training.validation import validate
from timm_ext.transfer.run import run
from timm_ext.transfer.session import Session, make_data
from timm_ext.transfer.settings import Recipe
from timm_ext.transfer.settle import settled
from timm_ext.transfer.sources import Sources
from timm_ext.transfer.start import network_of, start_from

SPACING, SIZE = 2.0, (24, 32, 24)  # mm, voxels
NETWORK: dict[str, Any] = {"base_filters": 6, "levels": 3}


def task_of(name: str, **regions: list[int]) -> Task:
    """A task on the numbers of the data set."""
    return task_from_dict({"name": name, "modalities": ["T1"], "regions": regions, "labels": [0, 1, 2]})


SOURCE = task_of("hippocampus", whole=[1, 2])
TARGET = task_of("hippocampus-parts", anterior=[1], posterior=[2])


def settings_of(options: argparse.Namespace, seed: int, steps: int) -> TrainSettings:
    """Settings of a training of either kind."""
    return TrainSettings(
        steps=steps,
        lr=options.lr,
        schedule="constant",
        validate_every=options.every,
        seed=seed,
        keep="last",
        augment=False,
        accelerator="cpu",
        tensorboard=False,
    )


def source_network(
    options: argparse.Namespace, cases: Sequence[Prepared], seed: int, folder: Path
) -> nn.Module:
    """A network that has learned the whole hippocampus."""
    network = build_network("isensee2017", in_channels=1, out_channels=1, seed=seed, **NETWORK)
    settings = settings_of(options, seed, options.source_steps)
    Session(make_data(cases, (), SOURCE, settings), settings, folder).fit(network)
    return network


def tuned(
    options: argparse.Namespace, source: nn.Module, data: Data, seed: int, head: str, folder: Path
) -> dict[str, Any]:
    """The Dice of test cases before the first step and as training goes on."""
    sources = Sources(("M1",), (source,), (SOURCE,), ("",))
    recipe = Recipe(seed=seed, head=head)
    start = start_from("transfer-1", network_of(sources, TARGET, seed), TARGET, sources, recipe)
    settings = settings_of(options, seed, options.steps)
    session = Session(data, settings, folder)
    start = settled(start, session)
    assert data.val is not None
    first = validate(launch(settings), start.model, data.val, 2, loss_of(TARGET), settings).mean_dice
    curve = run(start, tuning=session).histories[0].curve("val_dice")
    return {
        "head": head,
        "dice": [[step, round(dice, 4)] for step, dice in [(0, first), *curve]],
        "evidence": dict(start.evidence),
    }


def measure(options: argparse.Namespace, cases: Sequence[Prepared], repeat: int) -> list[dict[str, Any]]:
    """One repeat: both heads for each number of training cases."""
    by_id = {one.id: one for one in cases}
    counts = (options.source_cases, max(options.cases), options.test_cases)
    parts = split_cases([one.case for one in cases], [count / len(cases) for count in counts], seed=repeat)
    learned, training, tested = ([by_id[case.id] for case in part] for part in parts)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        source = source_network(options, learned, repeat, Path(folder) / "source")
        for count in options.cases:
            for head in ("given", "fitted"):
                data = make_data(training[:count], tested, TARGET, settings_of(options, repeat, 1))
                place = Path(folder) / f"{head}-{count}"
                rows.append(
                    {
                        "repeat": repeat,
                        "cases": count,
                        **tuned(options, source, data, repeat, head, place),
                    }
                )
    return rows


def main(arguments: list[str]) -> None:
    """Run all repeats and write the result after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", type=int, nargs="+", default=[2, 8], help="that are trained on")
    parser.add_argument("--source-cases", type=int, default=24)
    parser.add_argument("--test-cases", type=int, default=12)
    parser.add_argument("--source-steps", type=int, default=60)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=10, help="steps between scores")
    parser.add_argument("--lr", type=float, default=3e-3)
    options = parser.parse_args(arguments)
    noted = {name: value for name, value in vars(options).items() if name not in ("data", "output")}
    result: dict[str, Any] = {"environment": environment(), "settings": noted, "rows": []}
    prepare = PrepareSettings(spacing=SPACING, size=SIZE)
    every = read_cases(options.data, TARGET, require_labels=True)
    cases = prepare_cases(every, TARGET, prepare, None, progress=False)
    for repeat in range(options.repeats):
        result["rows"] += measure(options, cases, repeat)
        print(json.dumps(result["rows"][-1]), flush=True)
        write_json(options.output, result)


if __name__ == "__main__":
    main(sys.argv[1:])
