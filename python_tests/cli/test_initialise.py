import csv
import json
import pickle

import nibabel as nib
import numpy as np
import pytest
import torch
from cli_cases import SMALL, TRAIN, copy_case, failure, fishers, save_source, sources
from files_for_tests import Evil
from networks_for_tests import permuted_copy, random_permutations
from safetensors.torch import load_file, save_file

from timm_ext.checkpoint import load_checkpoint, save_checkpoint
from timm_ext.cli import run
from timm_ext.data.tasks import get_task, task_to_dict
from timm_ext.fisher import Fisher
from timm_ext.networks.channel_trace import trace_channels
from timm_ext.networks.io import load_network, save_network
from timm_ext.networks.registry import build_network


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


def test_merge_compares_channels_on_images(place, tmp_path, capsys):
    model, checkpoint = load_network(sources(place)[0])
    channels = trace_channels(model)
    twin = permuted_copy(model, channels, random_permutations(channels))
    path, out = tmp_path / "twin.safetensors", tmp_path / "out.safetensors"
    save_network(path, twin, task=checkpoint.metadata["task"], settings=checkpoint.metadata.get("settings"))
    command = ["merge", sources(place)[0], str(path), "--ratios", "1,1", "--out", str(out)]
    assert run([*command, "--align", "--data", str(place / "tumours")]) == 0
    assert f"compared by responses to images of {place / 'tumours'} (2)" in " ".join(
        capsys.readouterr().out.split()
    )
    merged = load_file(out)
    assert all(torch.equal(merged[name], tensor) for name, tensor in load_file(sources(place)[0]).items())
    assert "--data: expected --align beside it" in failure(capsys, [*command, "--data", str(place)])
    assert "expected cases in a known format" in failure(capsys, [*command, "--align", "--data", tmp_path])


def test_merge_compares_channels_on_images_of_other_names(place, tmp_path, capsys):
    scans = sorted((place / "tumours").rglob("*_T1.nii.gz"))
    rows = [
        f"{scan.parent.name},{scan},{scan.with_name(scan.name.replace('_T1.', '_T2.'))}" for scan in scans
    ]
    cases, out = tmp_path / "cases.csv", tmp_path / "out.safetensors"
    cases.write_text("\n".join(["id,MPRAGE of ours,T2", *rows]))
    command = ["merge", *sources(place), "--method", "mean-imm", "--align", "--out", str(out)]
    command += ["--data", str(cases)]
    error = failure(capsys, command)
    assert "--channel 'T1=NAME' gives the network's T1 the images that the cases call NAME" in error
    assert run([*command, "--channel", "T1=MPRAGE of ours"]) == 0
    assert f"compared by responses to images of {cases} (2)" in " ".join(capsys.readouterr().out.split())
    without = [*sources(place), "--out", out, "--channel", "T1=x"]
    assert "--channel: expected --data beside it" in failure(capsys, ["merge", *without])


def test_given_ratios_of_aligned_networks(place, tmp_path, capsys):
    twin = save_source(tmp_path / "twin.safetensors", "parcellation-1-7", seed=5)
    command = ["merge", sources(place)[0], str(twin), "--align"]
    aligned, out, fresh = (tmp_path / f"{name}.safetensors" for name in ("aligned", "out", "fresh"))
    assert run([*command, "--method", "transfer-2", "--keep-heads", "--out", str(aligned)]) == 0
    assert run([*command, "--ratios", "3,1", "--out", str(out)]) == 0
    assert "merge by ratios 0.75, 0.25 of M1, twin" in capsys.readouterr().out
    one, other, merged = (load_file(path) for path in (sources(place)[0], aligned, out))
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, 0.75 * one[name] + 0.25 * other[name])
    noted = load_checkpoint(out).metadata["merge"]
    assert noted == {"method": "ratios", "sources": ["M1", "twin"], "ratios": [3.0, 1.0]}
    assert run([*command, "--ratios", "3,1", "--task", "brats", "--out", str(fresh)]) == 0
    assert load_network(fresh)[0].network_config["out_channels"] == 3
    assert "ratios: expected one for each of 2" in failure(capsys, [*command, "--ratios", "1", "--out", out])


@pytest.mark.parametrize("norms", [True, False])
def test_running_statistics_are_merged_or_said_to_start_over(tmp_path, capsys, norms):
    options = {"channels": [4, 8], "strides": [2], "num_res_units": 1, "norm": "batch"}
    for number in (1, 2):
        model = build_network("monai.UNet", in_channels=2, out_channels=7, seed=number, **options).train()
        generator = torch.Generator().manual_seed(number)
        for _ in range(number):
            model(torch.rand(2, 2, 8, 8, 8, generator=generator))
        task = task_to_dict(get_task("parcellation-1-7"))
        save_network(tmp_path / f"m{number}.safetensors", model, task=task)
    paths, out = [str(tmp_path / f"m{number}.safetensors") for number in (1, 2)], tmp_path / "out.safetensors"
    arguments = ["merge", *paths, "--method", "mean-imm", "--set", f"merge.transfer_norms={norms}"]
    assert run([*arguments, "--out", str(out)]) == 0
    told = capsys.readouterr().out
    one, two, got = (load_file(path) for path in (*paths, out))
    name = "model.0.conv.unit0.adn.N"
    wanted = (one[f"{name}.running_mean"] + two[f"{name}.running_mean"]) / 2
    torch.testing.assert_close(got[f"{name}.running_mean"], wanted if norms else torch.zeros(4))
    assert got[f"{name}.num_batches_tracked"] == (2 if norms else 0)
    assert (name in told) is not norms
    assert "start over, as these norms do" in told  # those of the heads


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
    told = capsys.readouterr().out
    assert "never saw T1c, FLAIR: there the first layer starts with" in told
    assert "ratios per filter: networks of different initialisations want them per kernel, by --set" in told


@pytest.mark.parametrize("options", [["--method", "medmerge-aligned"], ["--set", "merge.granularity=layer"]])
def test_adapt_advises_nothing_where_ratios_suit_the_sources(place, tmp_path, capsys, options):
    twice = [*sources(place)[:1] * 2, *fishers(place)[:2] * 2]
    used = twice if options[0] == "--set" else sources(place)
    arguments = ["adapt", *used, *options, "--data", str(place / "tumours"), "--val-share", "0", *TRAIN]
    assert run([*arguments, "--out", str(tmp_path)]) == 0
    assert "want them per kernel" not in capsys.readouterr().out


def test_adapt_estimates_the_fishers_that_it_lacks(place, tmp_path, capsys):
    out = tmp_path / "run"
    target = ["adapt", *sources(place), "--data", str(place / "tumours"), "--val-share", "0.5", *TRAIN]
    assert run([*target, "--out", str(out)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "Fishers of M1, M2: on the images of" in told
    assert "with labels sampled from each network's prediction" in told
    assert "M2: of another initialisation than M1; channels are brought into one order first" in told
    made = sorted((out / "fishers").iterdir())
    assert [path.name[:3] for path in made] == ["M1-", "M2-"]
    first, second = map(Fisher.load, made)
    assert (first.count, first.kind.value) == (2, "bernoulli-sampled")
    assert second.metadata["network_sha256"] == load_checkpoint(sources(place)[1]).sha256
    assert load_checkpoint(out / "network.safetensors").metadata["settings"]["merge"]["align"] is True
    kept = [path.stat().st_mtime_ns for path in made]
    assert run([*target, "--out", str(out), "--resume"]) == 0
    assert [path.stat().st_mtime_ns for path in made] == kept
    own = ["--source-data", str(place / "brains")]
    apart = [*target, "--no-align", "--out", str(tmp_path / "own")]
    assert "expected cases for each of 2 networks" in failure(capsys, [*apart, *own])
    assert "--source-data: expected no --fisher beside it" in failure(capsys, [*apart, *own, *fishers(place)])
    assert run([*apart, *own, *own, "--set", "fisher.seed=0"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"Fishers of M1, M2: each on cases of its own, {place / 'brains'}" in told
    assert "one order" not in told
    assert (
        load_checkpoint(tmp_path / "own" / "network.safetensors").metadata["settings"]["merge"]["align"]
        is False
    )


def test_fishers_of_images_alone_have_sampled_labels(place, tmp_path, capsys):
    command = ["adapt", *sources(place), "--data", place / "tumours", "--out", tmp_path / "run"]
    error = failure(capsys, [*command, "--set", 'fisher.labels="true"'])
    assert "fisher.labels: expected sampled for images of the new task" in error
    case, only, task = place / "tumours" / "case-000", tmp_path / "cases.json", tmp_path / "task.json"
    files = {name: str(case / f"case-000_{name}.nii.gz") for name in ("FLAIR", "label")}
    only.write_text(json.dumps([{"id": "a", **files}]))
    task.write_text(json.dumps({"name": "t", "modalities": ["FLAIR"], "regions": {"any": [1, 2, 3, 4]}}))
    error = failure(
        capsys, [*command[:3], "--data", only, "--val", only, "--task", task, "--out", tmp_path / "other"]
    )
    assert "a: missing modality T1 of task parcellation-1-7 (got FLAIR)" in error
    assert "for the Fisher of" in error
    assert "--source-data names cases of each network's own" in error


def test_nothing_is_estimated_before_all_cases_are_known_to_be_right(place, tmp_path, capsys):
    folder = copy_case(place, tmp_path)
    label = nib.load(file := next(folder.glob("*_seg.nii.gz")))
    values = np.asarray(label.dataobj).copy()
    values[0, 0, 0] = 9
    nib.save(nib.Nifti1Image(values, label.affine, label.header), file)
    command = ["adapt", *sources(place), "--task", "brats", *TRAIN, "--out", tmp_path / "run", "--data"]
    right, wrong = place / "tumours", folder.parent
    own = [right, "--source-data", place / "brains", "--source-data"]
    for options, message in (
        ([wrong, "--val", wrong], "of task brats (got 9)"),
        ([right, "--val", wrong], "of task brats (got 9)"),
        ([*own, place / "none"], "no such file or folder"),
        (
            [right, "--set", "merge.unseen={FLAIR: CT}"],
            "of the source for FLAIR (got CT",
        ),
    ):
        assert message in failure(capsys, [*command, *options])
        assert not (tmp_path / "run" / "fishers").exists()


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
    assert "warm_up: expected a finite number at least 0 and less than 1" in failure(capsys, wrong)


def test_methods_of_fine_tuning_are_no_merges(place, tmp_path, capsys):
    arguments = ["merge", *sources(place), "--out", tmp_path / "init.safetensors", "--method"]
    message = failure(capsys, [*arguments, "transfer-2-l2"])
    assert "merge by transfer-2, then use timm-ext train --init with --set train.l2_transfer=0.01" in message
    assert "give it to transfer-1" in failure(capsys, [*arguments, "transfer-joint"])
    assert "give them to merge --ratios" in failure(capsys, [*arguments, "soup"])
    assert run([*map(str, arguments), "transfer-2"]) == 0


def rewritten(source, target, change):
    checkpoint = load_checkpoint(source)
    tensors = dict(checkpoint.tensors)
    change(tensors)
    metadata = {key: value for key, value in checkpoint.metadata.items() if key not in ("kind", "versions")}
    save_checkpoint(target, tensors, kind=checkpoint.kind, **metadata)
    return target


def test_architectures_that_differ_are_counted_and_ten_are_listed(place, tmp_path, capsys):
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
    assert f"(got {len(differing)} that differ)" in error
    assert sum(f" {name}: " in error for name in differing) == 10
    assert error.rstrip().endswith(f"and {len(differing) - 10} more")
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
    error = failure(capsys, ["merge", *sources(place), "--out", out])
    assert "mode-imm: expected a Fisher for each source network, by --fisher FILE" in error
    assert "timm-ext fisher NETWORK CASES --out FILE" in error
    other = save_source(
        tmp_path / "wide.safetensors", "parcellation-8-14", seed=2, options={**SMALL, "base_filters": 3}
    )
    error = failure(capsys, ["merge", sources(place)[0], other, "--out", out])
    assert "expected the same tensors" in error
    assert "Fisher" not in error
    adapt = ["adapt", sources(place)[0], other, "--data", tmp_path / "none", "--out", tmp_path / "run"]
    assert "expected the same tensors" in failure(capsys, adapt)
    assert "use timm-ext adapt" in failure(
        capsys, ["merge", *sources(place), "--method", "t-imm", "--out", out]
    )
    assert "use timm-ext adapt" in failure(
        capsys, ["merge", *sources(place), *fishers(place), "--method", "t-imm-annealed", "--out", out]
    )
    assert "expected one of scratch" in failure(
        capsys, ["merge", *sources(place), "--method", "nope", "--out", out]
    )
    assert "keep heads: expected sources with the outputs" in failure(
        capsys, ["merge", *sources(place), "--align", "--ratios", "1,1", "--out", out]
    )


def test_pickle_with_code_is_refused(place, tmp_path, capsys):
    path = tmp_path / "evil.pt"
    path.write_bytes(pickle.dumps({"state_dict": Evil(tmp_path / "ran")}))
    error = failure(
        capsys,
        ["merge", path, sources(place)[1], "--method", "mean-imm", "--out", tmp_path / "x.safetensors"],
    )
    assert "it was not run" in error
    assert not (tmp_path / "ran").exists()
