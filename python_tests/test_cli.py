import csv
import json
import os
import pickle
import re
import resource
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from timm_ext.checkpoint import load_checkpoint, save_checkpoint
from timm_ext.cli import run
from timm_ext.data.tasks import get_task, task_to_dict
from timm_ext.networks.io import load_network, save_network
from timm_ext.networks.registry import build_network

SMALL = {"base_filters": 2, "levels": 3}
TRAIN = ["--set", "train.tensorboard=false", "--set", "train.steps=2", "--set", "train.accelerator=cpu"]
NETWORK = ["--set", "network.options={base_filters: 2, levels: 3}"]


def save_source(path, task, *, seed, options=SMALL):
    described = get_task(task)
    model = build_network(
        "isensee2017",
        in_channels=len(described.modalities),
        out_channels=len(described.regions),
        seed=seed,
        **options,
    )
    save_network(path, model, task=task_to_dict(described))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two tumour cases, two parcellation cases and two source networks with Fishers."""
    folder = tmp_path_factory.mktemp("cli")
    sizes = ["--count", "2", "--spacing", "8", "--size", "20", "24", "20"]
    assert run(["phantom", str(folder / "tumours"), "--task", "brats", *sizes]) == 0
    assert run(["phantom", str(folder / "brains"), "--task", "parcellation-1-7", *sizes]) == 0
    save_source(folder / "M1.safetensors", "parcellation-1-7", seed=1)
    save_source(folder / "M2.safetensors", "parcellation-8-14", seed=2)
    for number in (1, 2):
        fisher = [
            str(folder / f"M{number}.safetensors"),
            str(folder / "brains"),
            "--out",
            str(folder / f"F{number}.safetensors"),
        ]
        assert run(["fisher", *fisher, "--limit", "1"]) == 0
    return folder


def sources(place):
    return [str(place / "M1.safetensors"), str(place / "M2.safetensors")]


def test_fisher_of_volumes_of_different_size(place, tmp_path):
    out = tmp_path / "F.safetensors"
    assert run(["fisher", sources(place)[0], str(place / "brains"), "--out", str(out)]) == 0
    assert load_checkpoint(out).metadata["fisher"]["count"] == 2


def fishers(place):
    return ["--fisher", str(place / "F1.safetensors"), "--fisher", str(place / "F2.safetensors")]


def failure(capsys, arguments, *, status=1):
    """Run a command that must fail and return its message."""
    capsys.readouterr()
    assert run(list(map(str, arguments))) == status
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    return error


def test_merge_is_the_fisher_weighted_mean_of_the_files(place, tmp_path):
    out = tmp_path / "init.safetensors"
    arguments = ["merge", *sources(place), *fishers(place), "--method", "mode-imm", "--task", "brats"]
    assert run([*arguments, "--out", str(out)]) == 0
    name = "encoder.1.entry.conv.weight"
    one, two = (load_file(path)[name].double() for path in sources(place))
    f_one, f_two = (load_file(place / f"F{n}.safetensors")[name].double() for n in (1, 2))
    expected = torch.where(f_one + f_two > 0, (f_one * one + f_two * two) / (f_one + f_two), (one + two) / 2)
    model, checkpoint = load_network(out)
    torch.testing.assert_close(model.state_dict()[name].double(), expected, rtol=1e-5, atol=1e-6)
    assert model.network_config["in_channels"], model.network_config["out_channels"] == (4, 3)
    assert checkpoint.metadata["parents"] == [load_checkpoint(path).sha256 for path in sources(place)]
    assert "granularity" in (tmp_path / "init.settings.yaml").read_text()


def test_merge_aligns_the_networks_first(place, tmp_path):
    out, plain = tmp_path / "aligned.safetensors", tmp_path / "plain.safetensors"
    arguments = ["merge", *sources(place), "--method", "mean-imm", "--task", "brats", "--out"]
    assert run([*arguments, str(plain)]) == 0
    assert run([*arguments, str(out), "--align"]) == 0
    (one, other), (merged, unaligned) = (
        [load_file(path) for path in paths] for paths in (sources(place), (out, plain))
    )
    names = [n for n, t in merged.items() if n.endswith("conv.weight") and t.shape == one[n].shape]
    before = after = 0.0
    for name in names:
        second = 2 * merged[name] - one[name]  # the second network's, in the order of the first one's
        torch.testing.assert_close(second.flatten().sort().values, other[name].flatten().sort().values)
        before += (other[name] - one[name]).square().sum().item()
        after += (second - one[name]).square().sum().item()
    assert after < before
    assert not all(torch.equal(merged[name], unaligned[name]) for name in names)
    assert load_checkpoint(out).metadata["settings"]["merge"]["align"] is True
    assert "align: true" in (tmp_path / "aligned.settings.yaml").read_text()
    named = tmp_path / "named.safetensors"
    arguments = ["merge", *sources(place), "--method", "mean-aligned", "--task", "brats"]
    assert run([*arguments, "--out", str(named)]) == 0
    assert all(torch.equal(load_file(named)[name], merged[name]) for name in names)


def test_adapt_by_medmerge(place, tmp_path, capsys):
    arguments = [
        "adapt",
        *sources(place),
        "--method",
        "medmerge",
        "--align",
        "--data",
        str(place / "tumours"),
    ]
    options = ["--set", "merge.mixing=free", "--set", "merge.anchor=2", "--set", "merge.granularity=filter"]
    assert run([*arguments, "--out", str(tmp_path), "--val-share", "0.5", *options, *TRAIN]) == 0
    facts = load_checkpoint(tmp_path / "network.safetensors").metadata["merge"]
    assert (facts["granularity"], facts["mixing"], facts["fisher"]) == ("filter", "free", False)
    assert facts["mean_ratios"][0] > 0.6
    assert facts["groups"][0] == "encoder.0.entry.conv[0]"
    assert "never saw T1c, FLAIR: there the first layer starts with" in capsys.readouterr().out


def test_adapt_with_options(place, tmp_path, capsys):
    arguments = ["adapt", *sources(place), *fishers(place), "--data", str(place / "tumours")]
    arguments += ["--val-share", "0.5", *TRAIN, "--out", str(tmp_path)]
    annealed = [*arguments, "--method", "t-imm-annealed"]
    pulls = ["--set", "adapt.weight_pull=0.5", "--set", "adapt.logit_pull=0.1"]
    assert run([*annealed, *pulls, "--set", "adapt.warm_up=0.5", "--set", "adapt.specific_lr=0.02"]) == 0
    with (tmp_path / "training" / "log.csv").open() as file:
        first = next(csv.DictReader(file))
    assert float(first["lr_specific"]) == 0.02
    assert "lr_offset" in first
    adapted = load_checkpoint(tmp_path / "network.safetensors").metadata["settings"]["adapt"]
    assert adapted == {
        "logit_lr": 0.1,
        "specific_lr": 0.02,
        "logit_pull": 0.1,
        "warm_up": 0.5,
        "weight_pull": 0.5,
    }
    capsys.readouterr()
    wrong = [*arguments, "--set", "adapt.weight_pull=1"]
    assert "methods that learn the ratios in fine-tuning" in failure(capsys, wrong)
    wrong = [*annealed, "--set", "adapt.warm_up=1"]
    assert "warm_up must be at least 0 and less than 1" in failure(capsys, wrong)


def test_adapt_then_train_then_predict_then_evaluate(place, tmp_path, capsys):
    cases = str(place / "tumours")
    adapted, tuned, predicted = (tmp_path / name for name in ("adapted", "tuned", "predicted"))
    adapt = [
        "adapt",
        *sources(place),
        *fishers(place),
        "--data",
        cases,
        "--val-share",
        "0.5",
        "--out",
        str(adapted),
    ]
    assert run([*adapt, *TRAIN]) == 0
    rows = list(csv.DictReader((adapted / "training" / "ratios.csv").open()))
    assert {row["layer"] for row in rows if row["step"] == "0"} >= {"encoder.0.entry.conv"}
    assert all(abs(float(row["M1"]) + float(row["M2"]) - 1) < 1e-6 for row in rows)
    initial = str(adapted / "network.safetensors")
    train = [
        "train",
        cases,
        "--val",
        cases,
        "--init",
        initial,
        "--out",
        str(tuned),
        "--set",
        "prepare.margin=1",
        *TRAIN,
    ]
    assert run(train) == 0
    network = tuned / "network.safetensors"
    checkpoint = load_checkpoint(network)
    assert checkpoint.metadata["parents"] == [load_checkpoint(initial).sha256]
    assert checkpoint.metadata["settings"]["prepare"]["margin"] == 1
    assert run(["predict", str(network), cases, "--out", str(predicted), "--flips"]) == 0
    image = nib.load(place / "tumours" / "case-000" / "case-000_T1.nii.gz")
    label = nib.load(predicted / "case-000.nii.gz")
    assert label.shape == image.shape
    np.testing.assert_array_equal(label.affine, image.affine)
    assert "margin: 1" in (predicted / "settings.yaml").read_text()
    capsys.readouterr()
    assert run(["evaluate", str(predicted), cases, "--out", str(tmp_path / "scores")]) == 0
    assert "WT" in capsys.readouterr().out
    assert set(json.loads((tmp_path / "scores" / "metrics.json").read_text())["cases"]) == {
        "case-000",
        "case-001",
    }


def test_resumed_training_is_the_undisturbed_one(place, tmp_path):
    cases = str(place / "tumours")
    common = [*NETWORK, "--val-share", "0", "--set", "prepare.crop=false", *TRAIN]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(["train", cases, "--out", str(whole), *common, "--set", "train.steps=4"]) == 0
    assert run(["train", cases, "--out", str(parts), *common, "--set", "train.steps=2"]) == 0
    assert run(["train", cases, "--out", str(parts), *common, "--set", "train.steps=4", "--resume"]) == 0
    one, other = (load_file(path / "network.safetensors") for path in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_l2_transfer_keeps_the_shared_weights_near_the_start(place, tmp_path, capsys):
    start = str(save_source(tmp_path / "network.safetensors", "brats", seed=3))
    free = [str(place / "tumours"), "--val-share", "0", "--set", "prepare.crop=false", *TRAIN]
    tied = [*free, "--set", "train.l2_transfer=100", "--set", "train.lr=0.01", "--set", "train.steps=3"]
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    assert run(["train", *tied, "--init", start, "--out", one, "--set", "train.l2_transfer=0"]) == 0
    assert run(["train", *tied, "--init", start, "--out", other]) == 0
    begin, plain, near = (load_file(f"{path}/network.safetensors") for path in (tmp_path, one, other))
    ways = {name: [(end[name] - begin[name]).abs().mean() for end in (plain, near)] for name in begin}
    assert ways["encoder.1.entry.conv.weight"][1] < 0.8 * ways["encoder.1.entry.conv.weight"][0]
    assert ways["heads.0.weight"][1] > 0.5 * ways["heads.0.weight"][0]
    message = failure(capsys, ["train", *tied, *NETWORK, "--out", tmp_path / "scratch"])
    assert "timm-ext train without --init: expected l2_transfer 0" in message


def test_methods_of_fine_tuning_are_no_merges(place, tmp_path, capsys):
    arguments = ["merge", *sources(place), "--out", tmp_path / "init.safetensors", "--method"]
    message = failure(capsys, [*arguments, "transfer-2-l2"])
    assert "merge by transfer-2, then use timm-ext train --init with --set train.l2_transfer=0.01" in message
    assert "give it to transfer-1" in failure(capsys, [*arguments, "transfer-joint"])
    assert "give them to merge --ratios" in failure(capsys, [*arguments, "soup"])
    assert run([*map(str, arguments), "transfer-2"]) == 0


def test_predict_from_single_images(place, tmp_path):
    folder = place / "brains" / "case-000"
    images = [text for m in ("T1", "T2") for text in ("--image", f"{m}={folder / f'case-000_{m}.nii.gz'}")]
    assert run(["predict", sources(place)[0], *images, "--out", str(tmp_path), "--probabilities"]) == 0
    assert (tmp_path / "case-000_T1.nii.gz").exists()
    assert nib.load(tmp_path / "case-000_T1_probabilities.nii.gz").shape[-1] == 7


def test_prepare_fills_a_cache(place, tmp_path, capsys):
    assert (
        run(["prepare", str(place / "tumours"), "--cache", str(tmp_path), "--set", "prepare.multiple=4"]) == 0
    )
    assert re.search(r"case-001: \d+ × \d+ × \d+ voxels, labels \[0, ", capsys.readouterr().out)
    assert len(list(tmp_path.glob("case-*.safetensors"))) == 2


def test_info(place, capsys):
    assert run(["info"]) == 0
    text = capsys.readouterr().out
    for wanted in (
        "instruction set, chosen",
        "torch, built for",
        "CUDA architectures",
        "GPU",
        "isensee2017",
        "t-imm",
    ):
        assert wanted in text
    assert run(["info", sources(place)[0]]) == 0
    assert "parcellation-1-7" in capsys.readouterr().out


def test_help_of_every_command_has_an_example(capsys):
    for name in (
        "phantom",
        "prepare",
        "train",
        "fisher",
        "merge",
        "adapt",
        "predict",
        "evaluate",
        "demo",
        "info",
    ):
        assert run([name, "--help"]) == 0
        assert "Example:" in capsys.readouterr().out


def test_wrong_usage_is_one_line(capsys):
    assert "No such command 'trian'" in failure(capsys, ["trian"], status=2)
    assert "CASES" in failure(capsys, ["train", "--out", "x"], status=2)


def test_debug_shows_the_traceback(capsys, tmp_path):
    assert run(["info", str(tmp_path / "none.safetensors"), "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def rewritten(source, target, change):
    checkpoint = load_checkpoint(source)
    tensors = dict(checkpoint.tensors)
    change(tensors)
    metadata = {key: value for key, value in checkpoint.metadata.items() if key not in ("kind", "versions")}
    save_checkpoint(target, tensors, kind=checkpoint.kind, **metadata)
    return target


def test_architectures_that_differ_are_listed_in_full(place, tmp_path, capsys):
    other = save_source(
        tmp_path / "wide.safetensors", "parcellation-8-14", seed=2, options={**SMALL, "base_filters": 3}
    )
    out = tmp_path / "init.safetensors"
    error = failure(capsys, ["merge", sources(place)[0], other, "--method", "mean-imm", "--out", out])
    first, second = load_file(sources(place)[0]), load_file(other)
    differing = [
        name
        for name in first
        if first[name].shape != second[name].shape
        and "norm" not in name
        and "heads" not in name
        and name != "encoder.0.entry.conv.weight"
    ]
    assert all(name in error for name in differing)
    assert not out.exists()


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN or infinite"), (-1.0, "negative")])
def test_fisher_with_bad_values(place, tmp_path, capsys, value, word):
    tensors = load_file(place / "F1.safetensors")
    name = "encoder.1.entry.conv.weight"
    tensors[name][0, 0, 0, 0, 0] = value
    metadata = {"timm_ext": json.dumps(load_checkpoint(place / "F1.safetensors").metadata)}
    save_file(tensors, tmp_path / "F1.safetensors", metadata=metadata)
    arguments = [
        "merge",
        *sources(place),
        "--fisher",
        tmp_path / "F1.safetensors",
        "--fisher",
        place / "F2.safetensors",
    ]
    out = tmp_path / "init.safetensors"
    error = failure(capsys, [*arguments, "--out", out])
    assert name in error
    assert word in error
    assert not out.exists()


def test_fisher_of_another_network(place, tmp_path, capsys):
    files = ["--fisher", place / "F2.safetensors", "--fisher", place / "F1.safetensors"]
    error = failure(capsys, ["merge", *sources(place), *files, "--out", tmp_path / "init.safetensors"])
    assert "that of another network" in error


def test_merge_without_fishers_or_with_a_learning_method(place, tmp_path, capsys):
    out = tmp_path / "init.safetensors"
    assert "a Fisher for each" in failure(capsys, ["merge", *sources(place), "--out", out])
    assert "use timm-ext adapt" in failure(
        capsys, ["merge", *sources(place), "--method", "t-imm", "--out", out]
    )
    assert "use timm-ext adapt" in failure(
        capsys, ["merge", *sources(place), *fishers(place), "--method", "t-imm-annealed", "--out", out]
    )
    assert "expected one of scratch" in failure(
        capsys, ["merge", *sources(place), "--method", "nope", "--out", out]
    )
    assert "(got --align)" in failure(
        capsys, ["merge", *sources(place), "--align", "--ratios", "1,1", "--out", out]
    )


class Evil:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_pickle_with_code_is_refused(place, tmp_path, capsys):
    path = tmp_path / "evil.pt"
    path.write_bytes(pickle.dumps({"state_dict": Evil(tmp_path / "ran")}))
    error = failure(
        capsys,
        ["merge", path, sources(place)[1], "--method", "mean-imm", "--out", tmp_path / "x.safetensors"],
    )
    assert "it was not run" in error
    assert not (tmp_path / "ran").exists()


def test_truncated_network(place, tmp_path, capsys):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(Path(sources(place)[0]).read_bytes()[:-100])
    assert "whole safetensors file" in failure(capsys, ["info", path])


def copy_case(place, target, *, task="tumours"):
    """Copy one case into a BraTS-like folder of its own."""
    folder = target / "cases" / "one"
    folder.mkdir(parents=True)
    for modality, suffix in (
        ("T1", "t1"),
        ("T1c", "t1ce"),
        ("T2", "t2"),
        ("FLAIR", "flair"),
        ("label", "seg"),
    ):
        source = place / task / "case-000" / f"case-000_{modality}.nii.gz"
        (folder / f"one_{suffix}.nii.gz").write_bytes(source.read_bytes())
    return folder


def change(path, data=None, affine=None):
    image = nib.load(path)
    values = np.asarray(image.dataobj)
    changed = values if data is None else data(values)
    nib.save(nib.Nifti1Image(changed, image.affine if affine is None else affine), path)


def truncate(folder):
    path = folder / "one_t1.nii.gz"
    path.write_bytes(path.read_bytes()[:2000])


def four_dimensions(folder):
    change(folder / "one_t2.nii.gz", lambda values: np.stack([values, values], axis=-1))


def other_affine(folder):
    change(folder / "one_flair.nii.gz", affine=np.diag([8.0, 8.0, 7.5, 1.0]))


def other_shape(folder):
    change(folder / "one_flair.nii.gz", lambda values: values[:-1])


def odd_labels(folder):
    change(folder / "one_seg.nii.gz", lambda values: np.where(values == 2, 7, values).astype(np.uint8))


def empty_labels(folder):
    change(folder / "one_seg.nii.gz", lambda values: (values * 0).astype(np.uint8))


def no_flair(folder):
    (folder / "one_flair.nii.gz").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"one_t1\.nii\.gz: .*(truncated|whole|damaged|read)"),
        (four_dimensions, r"one_t2\.nii\.gz: .*expected a volume with 3 axes"),
        (other_affine, r"one_flair\.nii\.gz: expected the affine of"),
        (other_shape, r"one_flair\.nii\.gz: expected the shape of"),
        (odd_labels, r"one_seg\.nii\.gz: expected the labels \[0, 1, 2, 3, 4\] of task brats \(got 7\)"),
        (empty_labels, r"one_seg\.nii\.gz: expected a voxel of some region"),
        (no_flair, r"one: missing modality FLAIR of task brats"),
    ],
)
def test_bad_case_stops_training_before_it_starts(place, tmp_path, capsys, damage, message):
    damage(copy_case(place, tmp_path))
    out = tmp_path / "run"
    error = failure(capsys, ["train", tmp_path / "cases", "--val-share", "0", "--out", out, *NETWORK, *TRAIN])
    assert re.search(message, error)
    assert not (out / "training").exists()
    assert not list(tmp_path.rglob(".partial-*"))


def test_network_that_does_not_fit_the_task(place, tmp_path, capsys):
    arguments = ["train", place / "tumours", "--init", sources(place)[0], "--out", tmp_path / "run"]
    error = failure(capsys, arguments)
    assert "4 inputs and 3 outputs" in error
    assert "timm-ext merge --method transfer-1" in error


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "either CASES or --image"),
        (["--image", "T1=none.nii.gz"], "none.nii.gz: no such file"),
        (["--image", "PET=x.nii.gz"], r"one of T1, T2 \(got 'PET=x.nii.gz'\)"),
    ],
)
def test_bad_images(place, tmp_path, capsys, images, message):
    assert re.search(message, failure(capsys, ["predict", sources(place)[0], "--out", tmp_path, *images]))


def test_missing_image(place, tmp_path, capsys):
    image = f"T1={place / 'brains' / 'case-000' / 'case-000_T1.nii.gz'}"
    error = failure(capsys, ["predict", sources(place)[0], "--out", tmp_path, "--image", image])
    assert "missing modality T2" in error


def test_evaluate_takes_files_folders_and_cases(place, tmp_path):
    truth = place / "tumours" / "case-000" / "case-000_label.nii.gz"
    folder = tmp_path / "labels"
    folder.mkdir()
    for number in range(2):
        name = f"case-00{number}"
        label = place / "tumours" / name / f"{name}_label.nii.gz"
        (folder / f"{name}.nii.gz").write_bytes(label.read_bytes())
    for number, truths in enumerate((folder, place / "tumours")):
        out = tmp_path / f"scores-{number}"
        assert run(["evaluate", str(folder), str(truths), "--out", str(out)]) == 0
        summary = json.loads((out / "metrics.json").read_text())["summary"]
        assert summary["mean"]["dice"] == {"mean": 1.0, "sd": 0.0, "median": 1.0, "count": 6, "undefined": 0}
    assert run(["evaluate", str(truth), str(truth)]) == 0


def test_evaluate_names_missing_predictions(place, tmp_path, capsys):
    error = failure(capsys, ["evaluate", tmp_path, place / "tumours"])
    assert "got none for case-000.nii.gz, case-001.nii.gz" in error
    assert "no such file" in failure(capsys, ["evaluate", tmp_path / "none", place / "tumours"])


@pytest.mark.parametrize("command", ["merge", "phantom", "demo", "train", "fisher"])
def test_output_that_cannot_be_written(place, tmp_path, capsys, command):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    arguments = {
        "merge": ["merge", *sources(place), "--method", "mean-imm", "--out", out],
        "phantom": ["phantom", out, "--count", "1", "--spacing", "8", "--size", "20", "24", "20"],
        "demo": ["demo", "--quick", "--out", out],
        "train": ["train", place / "tumours", "--out", out, *NETWORK, *TRAIN],
        "fisher": ["fisher", sources(place)[0], place / "brains", "--out", out],
    }
    assert "cannot be written" in failure(capsys, arguments[command])


def limited(arguments, size):
    """Run a command in a process whose files cannot grow beyond `size` bytes, as on a full disk."""
    code = "import sys; from timm_ext.cli import run; sys.exit(run(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
        check=False,
    )


@pytest.mark.parametrize("command", ["merge", "train"])
def test_full_disk(place, tmp_path, command):
    arguments = {
        "merge": ["merge", *sources(place), "--method", "mean-imm", "--out", tmp_path / "init.safetensors"],
        "train": [
            *("train", place / "tumours", "--cache", place / "cache", "--out", tmp_path / "run"),
            *(*NETWORK, *TRAIN, "--val-share", "0", "--set", "prepare.crop=false"),
        ],
    }[command]
    if command == "train":
        run(
            [
                "prepare",
                str(place / "tumours"),
                "--cache",
                str(place / "cache"),
                "--set",
                "prepare.crop=false",
                "--set",
                "prepare.multiple=4",
            ]
        )
    done = limited(arguments, 8192)
    assert done.returncode == 1
    assert re.match(r"error: .*cannot be written", done.stderr.splitlines()[0])
    assert "Traceback" not in done.stderr
    assert not [path for path in tmp_path.rglob("*.safetensors") if "prepared" not in path.parts]
    assert not list(tmp_path.rglob(".partial-*"))


def test_command_line_starts_without_the_heavy_libraries():
    code = (
        "import sys; from timm_ext.cli import run; run(['--help']); "
        "print({'monai', 'nibabel', 'SimpleITK', 'scipy', 'matplotlib', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
