import json
import os
import re
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from cli_cases import failure, fishers, sources

from timm_ext.cli import run
from timm_ext.errors import printable


def test_predict_from_single_images(place, tmp_path):
    folder = place / "brains" / "case-000"
    images = [text for m in ("T1", "T2") for text in ("--image", f"{m}={folder / f'case-000_{m}.nii.gz'}")]
    assert run(["predict", sources(place)[0], *images, "--out", str(tmp_path), "--probabilities"]) == 0
    assert (tmp_path / "case-000_T1.nii.gz").exists()
    assert nib.load(tmp_path / "case-000_T1_probabilities.nii.gz").shape[-1] == 7


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
    assert "got none for case-000, case-001" in error
    assert "no such file" in failure(capsys, ["evaluate", tmp_path / "none", place / "tumours"])


def image_options(folder, names=("T1", "T2")):
    return [text for m in names for text in ("--image", f"{m}={folder / f'case-000_{m}.nii.gz'}")]


def test_dots_in_a_scans_name_are_no_ending(place, tmp_path):
    source = place / "brains" / "case-000"
    names = ["1.3.12.2.1107.5.4.4.145", "1.3.12.2.1107.5.4.4.146"]
    for name in names:
        (tmp_path / f"{name}.nii.gz").write_bytes((source / "case-000_T1.nii.gz").read_bytes())
        images = [f"T1={tmp_path / name}.nii.gz", f"T2={source / 'case-000_T2.nii.gz'}"]
        options = [text for image in images for text in ("--image", image)]
        assert run(["predict", sources(place)[0], *options, "--out", str(tmp_path / "p")]) == 0
    assert sorted(path.name for path in (tmp_path / "p").glob("*.nii.gz")) == [
        f"{name}.nii.gz" for name in names
    ]


def test_predict_never_overwrites_a_scan(place, tmp_path, capsys):
    folder = tmp_path / "scans"
    folder.mkdir()
    for m in ("T1", "T2"):
        name = f"case-000_{m}.nii.gz"
        (folder / name).write_bytes((place / "brains" / "case-000" / name).read_bytes())
    before = (folder / "case-000_T1.nii.gz").read_bytes()
    error = failure(capsys, ["predict", sources(place)[0], *image_options(folder), "--out", folder])
    assert "case-000_T1.nii.gz: expected an output that is no input" in error
    assert (folder / "case-000_T1.nii.gz").read_bytes() == before


@pytest.mark.parametrize(
    ("ids", "options"), [(("a", "A"), []), (("a", "a_probabilities"), ["--probabilities"])]
)
def test_outputs_that_would_take_one_name_are_refused_before_the_first(place, tmp_path, capsys, ids, options):
    folder = place / "brains" / "case-000"
    rows = [{"id": name, **{m: str(folder / f"case-000_{m}.nii.gz") for m in ("T1", "T2")}} for name in ids]
    (tmp_path / "cases.json").write_text(json.dumps(rows))
    out = tmp_path / "p"
    error = failure(capsys, ["predict", sources(place)[0], tmp_path / "cases.json", "--out", out, *options])
    assert "expected a name of its own for each output" in error
    assert not list(out.glob("*"))


def test_one_modality_given_twice(place, tmp_path, capsys):
    options = image_options(place / "brains" / "case-000", ("T1", "T2", "T1"))
    error = failure(capsys, ["predict", sources(place)[0], *options, "--out", tmp_path])
    assert "--image: expected one file for T1" in error


@pytest.mark.parametrize("command", ["merge", "fisher", "train", "adapt"])
def test_results_never_overwrite_what_they_are_made_from(place, tmp_path, capsys, command):
    network = tmp_path / "network.safetensors"
    network.write_bytes((place / "M1.safetensors").read_bytes())
    arguments = {
        "merge": [network, place / "M2.safetensors", *fishers(place), "--out", network],
        "fisher": [network, place / "brains", "--out", network],
        "train": [place / "brains", "--task", "parcellation-1-7", "--init", network, "--out", tmp_path],
        "adapt": [network, place / "M2.safetensors", *fishers(place), "--data", place / "tumours"],
    }[command]
    out = ["--out", tmp_path] if command == "adapt" else []
    error = failure(capsys, [command, *arguments, *out])
    assert "network.safetensors: expected an output that is no input" in error
    assert network.read_bytes() == (place / "M1.safetensors").read_bytes()


def test_settings_are_noted_under_the_whole_name(place, tmp_path):
    for version in ("net.2024.01", "net.2024.02"):
        out = tmp_path / f"{version}.safetensors"
        assert run(["merge", *sources(place), "--method", "mean-imm", "--out", str(out)]) == 0
        assert (tmp_path / f"{version}.settings.yaml").is_file()


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize(
    "endings", [(".nii.gz", ".nii"), (".nii", ".nii.gz"), (".nii.gz", ".mgz"), (".mgz", ".nii")]
)
def test_evaluate_pairs_by_name_whatever_the_ending(place, tmp_path, endings, folder):
    label = nib.load(place / "tumours" / "case-000" / "case-000_label.nii.gz")
    data = label.get_fdata().astype("uint8")
    paths = []
    for name, ending in zip(("p", "t"), endings, strict=True):
        (tmp_path / name).mkdir()
        kind = nib.MGHImage if ending == ".mgz" else nib.Nifti1Image
        paths.append(tmp_path / name / f"2024.01.case{ending}")
        nib.save(kind(data, label.affine), paths[-1])
    arguments = [path.parent if folder else path for path in paths]
    assert run(["evaluate", *map(str, arguments), "--out", str(tmp_path / "s")]) == 0
    cases = json.loads((tmp_path / "s" / "metrics.json").read_text())["cases"]
    assert list(cases) == ["2024.01.case"]
    assert {score["dice"] for score in cases["2024.01.case"].values()} == {1.0}


def test_evaluate_scores_the_label_maps_among_a_predictions_files(place, tmp_path, capsys):
    (tmp_path / "p").mkdir()
    (tmp_path / "t").mkdir()
    label = place / "tumours" / "case-000" / "case-000_label.nii.gz"
    image = nib.load(label)
    for name in ("p", "t"):
        (tmp_path / name / "case-000.nii.gz").write_bytes(label.read_bytes())
    one = nib.Nifti1Image(image.get_fdata()[..., None] / 4, image.affine)  # the only region's
    nib.save(one, tmp_path / "p" / "case-000_probabilities.nii.gz")
    several = nib.Nifti1Image(image.get_fdata()[..., None].repeat(3, -1), image.affine)
    nib.save(several, tmp_path / "p" / "case-000_logits.nii.gz")
    (tmp_path / "p" / "settings.yaml").write_text("prepare: {}\n")
    assert (
        run(["evaluate", *(str(tmp_path / name) for name in ("p", "t")), "--out", str(tmp_path / "s")]) == 0
    )
    told = " ".join(capsys.readouterr().out.split())
    assert "no label maps of these cases: case-000_logits.nii.gz, case-000_probabilities.nii.gz" in told
    assert list(json.loads((tmp_path / "s" / "metrics.json").read_text())["cases"]) == ["case-000"]


def test_evaluate_against_cases_leaves_out_what_no_case_has(place, tmp_path, capsys):
    (tmp_path / "p").mkdir()
    for number in range(2):
        label = place / "tumours" / f"case-00{number}" / f"case-00{number}_label.nii.gz"
        nib.save(nib.load(label), tmp_path / "p" / f"case-00{number}.nii")
        (tmp_path / "p" / f"case-00{number}_probabilities.nii.gz").write_bytes(label.read_bytes())
    assert run(["evaluate", str(tmp_path / "p"), str(place / "tumours")]) == 0
    assert "case-000_probabilities.nii.gz" in capsys.readouterr().out


def test_a_prediction_without_a_truth_is_an_error_still(place, tmp_path, capsys):
    for name, cases in (("p", ("a", "b_probabilities")), ("t", ("a",))):
        (tmp_path / name).mkdir()
        for case in cases:
            label = place / "tumours" / "case-000" / "case-000_label.nii.gz"
            (tmp_path / name / f"{case}.nii.gz").write_bytes(label.read_bytes())
    error = failure(capsys, ["evaluate", tmp_path / "p", tmp_path / "t"])
    assert "expected a label file for every prediction (got none for b_probabilities)" in error


def test_evaluate_of_folders_without_a_common_name(place, tmp_path, capsys):
    for name in ("p", "t"):
        (tmp_path / name).mkdir()
        label = place / "tumours" / "case-000" / "case-000_label.nii.gz"
        (tmp_path / name / f"{name}1.nii.gz").write_bytes(label.read_bytes())
    error = failure(capsys, ["evaluate", tmp_path / "p", tmp_path / "t"])
    assert "or label maps named like the predictions (got t1 for predictions p1)" in error
    error = failure(capsys, ["evaluate", tmp_path / "p" / "p1.nii.gz", tmp_path / "t"])
    assert "expected a label map to score one with (got a folder)" in error


@pytest.mark.parametrize("name", ["[/bold]", "[red]x", "a\x1b[31m\nb", "±"])
def test_region_names_are_printed_as_they_are(place, tmp_path, capsys, name):
    task = {
        "name": name,
        "modalities": ["T1"],
        "regions": {name: [1], "rest": [2, 4]},
        "labels": [0, 1, 2, 4],
    }
    (tmp_path / "task.json").write_text(json.dumps(task))
    truth = place / "tumours" / "case-000" / "case-000_label.nii.gz"
    assert run(["evaluate", str(truth), str(truth), "--task", str(tmp_path / "task.json")]) == 0
    printed = capsys.readouterr().out
    assert printable(name) in printed
    assert "\x1b" not in printed


def test_scores_and_segmentations_on_a_terminal_of_ascii(place, tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    truth = str(place / "tumours" / "case-000" / "case-000_label.nii.gz")
    folder = place / "brains" / "case-000"
    for command in (
        ["evaluate", truth, truth],
        ["predict", sources(place)[0], *image_options(folder), "--out", str(tmp_path / "±")],
        ["prepare", str(place / "brains"), "--task", "parcellation-1-7", "--cache", str(tmp_path / "c")],
    ):
        program = [sys.executable, "-m", "timm_ext", *map(str, command)]
        result = subprocess.run(program, capture_output=True, env=environment, check=False)
        assert result.returncode == 0, result.stderr.decode()
        assert result.stdout.decode("ascii")


def saved_labels(folder, **maps):
    """Write label maps `[4, 4, 4]` that begin with the numbers given, by case."""
    folder.mkdir(parents=True)
    for name, numbers in maps.items():
        data = np.zeros((4, 4, 4), np.uint8)
        data.flat[: len(numbers)] = numbers
        nib.save(nib.Nifti1Image(data, np.eye(4)), folder / f"{name}.nii.gz")
    return str(folder)


@pytest.fixture
def two_regions(tmp_path):
    path = tmp_path / "two.yaml"
    path.write_text("name: two\nmodalities: [T1]\nregions: {lesion: [1], thalamus: [2]}\n")
    return ["--task", str(path)]


def test_evaluate_says_what_its_table_leaves_out(tmp_path, capsys, two_regions):
    predictions = saved_labels(tmp_path / "p", a=[1, 1], b=[])
    truths = saved_labels(tmp_path / "t", a=[1, 1], b=[1], **{f"c{n:02}": [1] for n in range(12)})
    assert run(["evaluate", predictions, truths, *two_regions]) == 0
    told = " ".join(capsys.readouterr().out.split())
    missing = ", ".join(f"c{n:02}" for n in range(10))
    assert f"no prediction for 12 of 14 true label maps, not scored: {missing}, and 2 more" in told
    assert "Mean ± SD over 2 cases" in told
    assert told.count("0.500 ± 0.707") == 2  # the lesion's Dice, and the mean's without the thalamus
    assert told.count("0.000 ± – (1 undefined)") == 2
    assert "in no case: thalamus; left out of the mean" in told
    assert "undefined: only prediction or only truth holds the region; left out of the mean HD95" in told


def test_evaluate_of_one_case_has_no_deviation_and_nothing_to_say(tmp_path, capsys, two_regions):
    truths = saved_labels(tmp_path / "t", a=[1, 2])
    assert run(["evaluate", truths, truths, *two_regions, "--out", str(tmp_path / "s")]) == 0
    told = capsys.readouterr().out
    assert "Mean ± SD over 1 case" in map(str.strip, told.splitlines())
    assert told.count("1.000 ± –") == told.count("0.000 ± –") == 3
    assert not re.search("no prediction|in no case|undefined", told)
    stored = json.loads((tmp_path / "s" / "metrics.json").read_text())["summary"]
    assert {stored[region]["dice"]["sd"] for region in ("lesion", "thalamus", "mean")} == {None}


def test_label_maps_without_any_region_of_the_task_are_refused(tmp_path, capsys, two_regions):
    empty = saved_labels(tmp_path / "t", a=[], b=[])
    error = failure(capsys, ["evaluate", empty, empty, *two_regions, "--out", tmp_path / "s"])
    assert "expected a region of task two in at least one label map (got none of lesion, thalamus" in error
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("kept", ["network.safetensors", "settings.yaml"])  # done, or interrupted
@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_the_folder_of_a_training_run_takes_no_other_results(place, tmp_path, capsys, kept, command):
    (tmp_path / "m" / "training").mkdir(parents=True)
    (tmp_path / "m" / kept).write_text("as it is")
    labels = str(place / "tumours" / "case-000" / "case-000_label.nii.gz")
    arguments = {"predict": [sources(place)[0], place / "brains"], "evaluate": [labels, labels]}[command]
    error = failure(capsys, [command, *arguments, "--out", tmp_path / "m"])
    assert "m: expected a folder without a training run" in error
    assert f"(got one with {kept} and training/)" in error
    assert {path.name for path in (tmp_path / "m").iterdir()} == {kept, "training"}
    assert (tmp_path / "m" / kept).read_text() == "as it is"
