"""Scores two networks of nnU-Net, what merges make of them, and what nnU-Net makes of those in a short epoch.

    python -m benchmarks.nnunet_hippocampus HIPPOCAMPUS WORK benchmarks/results/nnunet_hippocampus.json

HIPPOCAMPUS is Task 04 of the Medical Segmentation Decathlon in nnU-Net's raw layout; WORK keeps what was
trained, and a run that is started again goes on there. nnU-Net (`nnunetv2`) plans, preprocesses, trains and
predicts with its own classes, in a smaller network and in fewer iterations than it would take, by its Adam:
by SGD, its default, networks of some hundred iterations find nothing yet. Folds 0 and 1
are two networks of different seeds on disjoint halves of the training cases; `timm-ext merge --folds 0,1
--keep-heads` makes one of both, as they are and with channels aligned, by weights or by responses to eight
of the training images; `timm-ext export` writes what
`-pretrained_weights` takes, with which nnU-Net trains on further cases (heads start anew, as it has it).
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

import timm_ext
from timm_ext.cli import run
from timm_ext.cli.compared import ComparedOn
from timm_ext.data.tasks import get_task
from timm_ext.documents import read_json
from timm_ext.files import write_json
from timm_ext.interop.networks import open_network
from timm_ext.merging import align
from timm_ext.merging.responses import correlations
from timm_ext.metrics import dice_by_region
from timm_ext.networks import heads_of
from timm_ext.networks.channel_trace import trace_channels
from timm_ext.system.environment import environment

DATASET, PLANS, CONFIGURATION = "Dataset004_Hippocampus", "nnUNetPlans", "3d_fullres"
MODEL = Path(DATASET) / f"nnUNetTrainer__{PLANS}__{CONFIGURATION}"
FIRST, SECOND, TARGET = 0, 1, 2  # folds: two halves, and the cases of the continuation
SUFFIX = ".nii.gz"


def prepare(options: argparse.Namespace) -> None:
    """Plan and preprocess the training cases by nnU-Net, and write which fold trains on which of them."""
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api

    preprocessed = options.work / "preprocessed" / DATASET
    if (preprocessed / "splits_final.json").exists():
        return
    _, target, *halves = parts(options)
    linked(options.data, [*target, *halves[0], *halves[1]], options.work / "raw" / DATASET)
    number = int(DATASET[7:10])
    set_variables(n_proc_DA=1)  # its preprocessing takes as many threads, and cannot have none
    api.extract_fingerprints([number], num_processes=1, show_progress_bar=False)
    api.plan_experiments([number])
    plans = read_json(preprocessed / f"{PLANS}.json")
    shrink(plans["configurations"][CONFIGURATION], options)
    write_json(preprocessed / f"{PLANS}.json", plans)
    api.preprocess([number], PLANS, (CONFIGURATION,), (1,), show_progress_bar=False)
    validated = (target, target, halves[0])  # nnU-Net wants some; they decide nothing
    folds = [{"train": t, "val": v} for t, v in zip((*halves, target), validated, strict=True)]
    write_json(preprocessed / "splits_final.json", folds)


def linked(data: Path, names: Sequence[str], out: Path) -> Path:
    """Make a data set of some cases of another one, by links, and return its folder."""
    for folder, files in (("imagesTr", [f"{name}_0000" for name in names]), ("labelsTr", names)):
        (out / folder).mkdir(parents=True, exist_ok=True)
        for file in files:
            link = out / folder / f"{file}{SUFFIX}"
            link.unlink(missing_ok=True)
            link.symlink_to(data.resolve() / folder / link.name)
    write_json(out / "dataset.json", {**read_json(data / "dataset.json"), "numTraining": len(names)})
    return out


def parts(options: argparse.Namespace) -> list[list[str]]:
    """Names of the cases that are tested on, continued on, and of the two halves."""
    names = sorted(path.name.removesuffix(SUFFIX) for path in (options.data / "labelsTr").glob(f"*{SUFFIX}"))
    random.Random(options.seed).shuffle(names)
    target = options.test + options.target
    middle = (target + len(names)) // 2
    bounds = (0, options.test, target, middle, len(names))
    return [sorted(names[start:end]) for start, end in pairwise(bounds)]


def shrink(configuration: dict[str, Any], options: argparse.Namespace) -> None:
    """Give nnU-Net's plan fewer channels and a smaller batch."""
    configuration["batch_size"] = options.batch
    settings = configuration["architecture"]["arch_kwargs"]
    settings["features_per_stage"] = [
        options.features * 2**stage for stage in range(len(settings["features_per_stage"]))
    ]


def train(
    options: argparse.Namespace, arm: str, fold: int, epochs: int, start: Path | None = None, repeat: int = 0
) -> Path:
    """Train a fold by nnU-Net's trainer, and return the model folder; one that is there is kept."""
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
    from nnunetv2.run.run_training import get_trainer_from_args
    from nnunetv2.training.nnUNetTrainer.variants.optimizer.nnUNetTrainerAdam import nnUNetTrainerVanillaAdam

    results = options.work / "results" / arm
    set_variables(results=results, n_proc_DA=0)  # examples are drawn in this process, by the seed
    folder = results / MODEL
    if (folder / f"fold_{fold}" / "checkpoint_final.pth").exists():
        return folder
    seed(options.seed + fold + len((FIRST, SECOND, TARGET)) * repeat)
    trainer = get_trainer_from_args(DATASET, CONFIGURATION, fold, device=torch.device("cpu"))
    trainer.num_epochs = epochs
    trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = options.iterations, 1
    trainer.initial_lr = options.lr
    trainer.configure_optimizers = partial(nnUNetTrainerVanillaAdam.configure_optimizers, trainer)
    trainer.initialize()
    if start is not None:
        load_pretrained_weights(trainer.network, str(start))
    with timm_ext.fast_layers():
        trainer.run_training()
    return folder


def set_variables(**values: object) -> None:
    """Set variables of nnU-Net's, which it reads when it needs them."""
    os.environ.update({f"nnUNet_{name}": str(value) for name, value in values.items()})


def seed(value: int) -> None:
    """Seed the generators that nnU-Net draws from."""
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def merged(options: argparse.Namespace, sources: Path, name: str, more: Sequence[str]) -> tuple[Path, Path]:
    """Merge both sources; return a model folder and what `-pretrained_weights` takes."""
    made = options.work / name.replace(" ", "-")
    network, folder, weights = made / "merged.safetensors", made / "folder", made / "init.pth"
    if not weights.exists():
        folds = ["--folds", f"{FIRST},{SECOND}", "--method", "mean-imm", "--keep-heads"]
        merge = ["merge", str(sources), *folds, *more, "--out", str(network)]
        for command in (merge, *(["export", str(network), "--out", str(out)] for out in (folder, weights))):
            if run(command):
                raise SystemExit(f"failed: timm-ext {' '.join(command)}")
    return folder, weights


def score(options: argparse.Namespace, folder: Path, folds: Sequence[int]) -> dict[str, Any]:
    """Dice of each label on the cases apart, by nnU-Net's predictor; several folds are its ensemble."""
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(
        use_mirroring=options.mirroring,
        perform_everything_on_device=False,
        device=torch.device("cpu"),
        allow_tqdm=False,
    )
    predictor.initialize_from_trained_model_folder(str(folder), tuple(folds), "checkpoint_final.pth")
    names, task = parts(options)[0], get_task(str(options.data / "dataset.json"))
    images = [[str(options.data / "imagesTr" / f"{name}_0000{SUFFIX}")] for name in names]
    with timm_ext.fast_layers():
        found = predictor.predict_from_files_sequential(images, None)
    truths = (SimpleITKIO().read_seg(str(options.data / "labelsTr" / f"{n}{SUFFIX}"))[0][0] for n in names)
    each = [dice_by_region(one, truth, task) for one, truth in zip(found, truths, strict=True)]
    regions = {region: round(float(np.mean([case[region] for case in each])), 4) for region in each[0]}
    cases = [round(float(np.mean(list(case.values()))), 4) for case in each]
    return {"dice": round(float(np.mean(cases)), 4), "regions": regions, "cases": cases}


def alignment(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """What alignment does: correlations of the channels that are averaged, and how far logits move by it.

    Correlations are the mean over all channels, of responses to cases apart.
    """
    sources = options.work / "results" / "sources" / MODEL
    (first, checkpoint), (second, _) = (open_network(sources / f"fold_{fold}") for fold in (FIRST, SECOND))
    test = linked(options.data, parts(options)[0], options.work / "test")
    seen, apart = (
        ComparedOn(folder, checkpoint, None, None).images(first)
        for folder in (options.work / "raw" / DATASET, test)
    )
    heads, channels = heads_of(first), trace_channels(first)
    networks = {
        "mean": second,
        "aligned mean": align(second, first, ignore=heads).model,
        "mean aligned on images": align(second, first, ignore=heads, images=seen).model,
    }
    found = {}
    every = correlations(list(networks.values()), first, channels, apart)
    for (name, network), r in zip(networks.items(), every, strict=True):
        alike = torch.cat([own.diag() for own in r.values()])
        with torch.no_grad():
            moved = (network.eval()(apart[0]) - second.eval()(apart[0])).abs().max()
        found[name] = {"correlation": round(float(alike.mean()), 4), "logits moved": float(f"{moved:.1e}")}
    return found


def networks(options: argparse.Namespace) -> Iterator[tuple[str, str, int, Path, tuple[int, ...]]]:
    """Name, stage, repeat, model folder and folds of every network, made when it is asked for."""
    for fold in (FIRST, SECOND):
        sources = train(options, "sources", fold, options.epochs)
    yield "first", "source", 0, sources, (FIRST,)
    yield "second", "source", 0, sources, (SECOND,)
    yield "ensemble", "source", 0, sources, (FIRST, SECOND)
    starts: dict[str, Path | None] = {"scratch": None}
    for name, fold in (("first", FIRST), ("second", SECOND)):
        starts[name] = sources / f"fold_{fold}" / "checkpoint_final.pth"
    images = ["--align", "--data", str(options.work / "raw" / DATASET)]
    ways = {"mean": [], "aligned mean": images[:1], "mean aligned on images": images}
    for name, more in ways.items():
        folder, starts[name] = merged(options, sources, name, more)
        yield name, "merge", 0, folder, (0,)
    for repeat in range(options.repeats):
        for name, start in starts.items():
            arm = "-".join([*name.split(), *([str(repeat)] if repeat else [])])
            yield name, "continued", repeat, train(options, arm, TARGET, 1, start, repeat), (TARGET,)


def main(arguments: list[str]) -> None:
    """Make and score all networks; write the result after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, metavar="HIPPOCAMPUS")
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("output", type=Path)
    parser.add_argument("--test", type=int, default=40, help="cases that are scored")
    parser.add_argument("--target", type=int, default=18, help="cases of the short epoch")
    parser.add_argument("--features", type=int, default=8, help="channels of the first stage")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=20, help="of each source")
    parser.add_argument("--iterations", type=int, default=50, help="of an epoch")
    parser.add_argument("--lr", type=float, default=1e-3, help="of Adam")
    parser.add_argument("--repeats", type=int, default=2, help="of the short epoch, by seeds of their own")
    parser.add_argument("--mirroring", action="store_true", help="predict as nnU-Net does by default")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    set_variables(**{name: options.work / name for name in ("raw", "preprocessed", "results")})
    settings = {k: v for k, v in vars(options).items() if k not in ("data", "work", "output")}
    result: dict[str, Any] = {"environment": environment(), "settings": settings, "rows": []}
    if options.output.exists() and (kept := read_json(options.output))["settings"] == settings:
        result = kept
    done = {(row["network"], row["stage"], row["repeat"]) for row in result["rows"]}
    prepare(options)
    for name, stage, repeat, folder, folds in networks(options):
        key = {"network": name, "stage": stage, "repeat": repeat}
        if tuple(key.values()) not in done:
            result["rows"].append({**key, **score(options, folder, folds)})
            print(json.dumps(result["rows"][-1]), flush=True)
            write_json(options.output, result)
    write_json(options.output, {**result, "alignment": alignment(options)})


if __name__ == "__main__":
    main(sys.argv[1:])
