"""What a resumed command must find again, and what it may find elsewhere."""

import csv
import shutil

import nibabel as nib
import numpy as np
import pytest
from cli_cases import NETWORK, TRAIN, failure, fishers, save_source, sources
from safetensors.torch import load_file

from timm_ext.cli import run

PLAIN = [*TRAIN, "--val-share", "0", "--set", "prepare.crop=false"]
MORE = ["--set", "train.steps=3", "--resume"]


def train(cases, out, *options):
    return list(map(str, ["train", cases, "--out", out, *NETWORK, *PLAIN, *options]))


@pytest.fixture
def begun(place, tmp_path):
    """A run of two steps on cases of its own."""
    cases = tmp_path / "cases"
    shutil.copytree(place / "tumours", cases)
    out = tmp_path / "run"
    assert run(train(cases, out)) == 0
    return cases, out


@pytest.mark.parametrize("command", ["train", "adapt"])
def test_a_folder_with_a_run_is_refused_before_any_case_is_read(place, tmp_path, capsys, command):
    (tmp_path / "run" / "training").mkdir(parents=True)
    (tmp_path / "run" / "training" / "state.pt").write_bytes(b"")
    cases, out = tmp_path / "none", ["--out", tmp_path / "run"]
    arguments = {
        "train": ["train", cases, *out, *NETWORK, *PLAIN],
        "adapt": ["adapt", *sources(place), *fishers(place), "--data", cases, *out, *PLAIN],
    }[command]
    error = failure(capsys, arguments)
    assert "training: expected a folder without a run" in error
    assert "--resume" in error
    assert "no such file" in failure(capsys, [*arguments, "--resume"])


def test_other_scans_of_equal_number_are_named(begun, capsys):
    cases, out = begun
    path = cases / "case-001" / "case-001_T2.nii.gz"
    image = nib.load(path)
    data = np.asarray(image.dataobj).copy()
    data[10, 12, 10] += 50
    nib.save(nib.Nifti1Image(data, image.affine), path)
    message = failure(capsys, train(cases, out, *MORE))
    assert "training set: other images, labels or preparation in case-001" in message


def test_another_preparation_is_named_and_the_run_can_still_go_on(begun, capsys):
    cases, out = begun
    settings = (out / "settings.yaml").read_text()
    message = failure(capsys, train(cases, out, *MORE, "--set", "prepare.normalise=histogram"))
    assert "prepare.normalise 'zscore', now 'histogram'" in message
    assert (out / "settings.yaml").read_text() == settings
    assert run(train(cases, out, *MORE)) == 0


def test_another_network_of_equal_shapes_is_named(begun, capsys):
    cases, out = begun
    options = ["--set", "network.options={base_filters: 2, levels: 3, dropout: 0.1}"]
    assert "network.options" in failure(capsys, train(cases, out, *MORE, *options))


def test_data_that_were_moved_are_the_same(begun, tmp_path):
    cases, out = begun
    whole = tmp_path / "whole"
    assert run(train(cases, whole, "--set", "train.steps=3")) == 0
    cases.rename(tmp_path / "moved")
    shutil.rmtree(out / "prepared")
    assert run(train(tmp_path / "moved", out, *MORE)) == 0
    one, other = (load_file(path / "network.safetensors") for path in (whole, out))
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert (whole / "training/log.csv").read_bytes() == (out / "training/log.csv").read_bytes()


def test_another_network_to_start_from_is_named(place, tmp_path, capsys):
    first, second = (save_source(tmp_path / f"{n}.safetensors", "brats", seed=n) for n in (1, 2))
    command = ["train", str(place / "tumours"), "--out", str(tmp_path / "run"), *PLAIN, "--init"]
    assert run([*command, str(first)]) == 0
    assert "network 1 " in failure(capsys, [*command, str(second), *MORE])
    first.rename(tmp_path / "renamed.safetensors")
    assert run([*command, str(tmp_path / "renamed.safetensors"), *MORE]) == 0


def test_other_sources_of_an_adaptation_are_named(place, tmp_path, capsys):
    out = tmp_path / "run"
    fixed = ["--data", str(place / "tumours"), "--out", str(out), *PLAIN]

    def adapt(networks, fishers, *options):
        files = [str(place / f"M{n}.safetensors") for n in networks]
        for n in fishers:
            files += ["--fisher", str(place / f"F{n}.safetensors")]
        return ["adapt", *files, *fixed, *options]

    assert run(adapt((1, 2), (1, 2))) == 0
    swapped = failure(capsys, adapt((2, 1), (2, 1), *MORE))
    assert "network 1 'M1 " in swapped
    assert "Fisher 1 " in swapped
    granularity = failure(capsys, adapt((1, 2), (1, 2), *MORE, "--set", "merge.granularity=model"))
    assert "merge.granularity None, now 'model'" in granularity
    assert "method 't-imm', now 't-imm-norms'" in failure(
        capsys, adapt((1, 2), (1, 2), *MORE, "--method", "t-imm-norms")
    )
    assert run(adapt((1, 2), (1, 2), *MORE)) == 0
    rows = list(csv.DictReader((out / "training" / "log.csv").open()))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
