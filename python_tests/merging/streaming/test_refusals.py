import errno
import os

import pytest
import torch
from safetensors.torch import save_file
from streaming_samples import assert_refused, fisher_of, save, weights

from timm_ext.checkpoint import load_checkpoint, save_checkpoint
from timm_ext.merging.streaming.merge import merge_checkpoints


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        ([1], "one for each of 2 checkpoints"),
        ([1, 2, 3], "one for each of 2 checkpoints"),
        ([1, -1], "finite numbers >= 0"),
        ([1, float("nan")], "finite numbers >= 0"),
        ([1, float("inf")], "finite numbers >= 0"),
        ([0, 0], "not all of them 0"),
    ],
    ids=str,
)
def test_ratios_that_do_not_fit(tmp_path, pair, ratios, message):
    assert_refused(tmp_path, f"ratios: expected {message}|ratios: .*{message}", pair, ratios=ratios)


def test_all_tensors_that_differ_are_listed(tmp_path, pair):
    other = weights(1)
    del other["scale"]
    other["embed.weight"] = other["embed.weight"][1:].clone()
    other["layers.0.weight"] = other["layers.0.weight"].bfloat16()
    other["more"] = torch.zeros(2)
    save_file(other, pair[1])
    assert_refused(
        tmp_path,
        r"(?s)same tensors \(got 4 that differ\)"
        r"(?=.*embed.weight: expected F32 \[301, 40\].*\(got F32 \[300, 40\])"
        r"(?=.*layers.0.weight: .*\(got BF16)(?=.*scale: .*\(got none\))(?=.*more: expected none)",
        pair,
    )


def test_all_integers_that_differ_are_listed(tmp_path, pair):
    other = weights(1)
    other["position_ids"] = other["position_ids"] + 1
    other["mask"] = ~other["mask"]
    save_file(other, pair[1])
    assert_refused(
        tmp_path,
        r"(?s)integers and booleans in all of them \(got 2 that differ\).*(mask|position_ids)",
        pair,
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path, pair, value):
    other = weights(1)
    other["layers.0.weight"][3, 4] = value
    save_file(other, pair[1])
    assert_refused(
        tmp_path, r"m1\.safetensors: expected finite weights.*1 or more elements of layers\.0\.weight", pair
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e-3])
def test_fisher_values(tmp_path, pair, value):
    fishers = [fisher_of(t) for t in range(2)]
    fishers[1]["embed.weight"][300, 39] = value
    files = [save(tmp_path / f"f{t}.safetensors", fisher) for t, fisher in enumerate(fishers)]
    message = r"f1\.safetensors: expected a finite, non-negative Fisher .*1 or more elements of embed\.weight"
    assert_refused(tmp_path, message, pair, fishers=files)


def test_fishers_that_do_not_fit(tmp_path, pair):
    fishers = [fisher_of(t) for t in range(2)]
    del fishers[0]["scale"]
    fishers[1]["embed.weight"] = torch.zeros(3)
    fishers[1]["layers.0.norm"] = fishers[1]["layers.0.norm"].double()
    for fisher in fishers:
        fisher |= {"unknown": torch.zeros(1), "mask": torch.zeros(2)}
    files = [save(tmp_path / f"f{t}.safetensors", fisher) for t, fisher in enumerate(fishers)]
    assert_refused(
        tmp_path,
        r"(?s)fishers: .*\(got 5 that do not fit\)(?=.*scale: )(?=.*embed.weight: )(?=.*layers.0.norm: )"
        r"(?=.*unknown: expected none)(?=.*mask: expected none)",
        pair,
        fishers=files,
    )
    assert_refused(tmp_path, "fishers: expected one for each of 2", pair, fishers=files[:1])
    nothing = save(tmp_path / "nothing.safetensors", {})
    assert_refused(tmp_path, "expected a Fisher .got no tensor", pair, fishers=[nothing] * 2)


def test_kinds_are_told_apart(tmp_path, pair):
    tensors = fisher_of(0)
    save_checkpoint(
        tmp_path / "f.safetensors", tensors, kind="fisher", provenance={"network_sha256": "0" * 64}
    )
    save_checkpoint(tmp_path / "n.safetensors", tensors, kind="network")
    fisher, network = tmp_path / "f.safetensors", tmp_path / "n.safetensors"
    assert_refused(tmp_path, "f.safetensors: expected a network", [fisher, fisher])
    assert_refused(tmp_path, "n.safetensors: expected a Fisher", [network] * 2, fishers=[network] * 2)
    assert_refused(tmp_path, "expected the Fisher of .*n.safetensors", [network] * 2, fishers=[fisher] * 2)


def test_networks_of_other_tasks_are_not_merged_as_they_are(tmp_path):
    paths, network = [], {"name": "x", "in_channels": 1, "out_channels": 1, "options": {}}
    for task in ("brats", "parcellation"):
        paths.append(tmp_path / f"{task}.safetensors")
        save_checkpoint(paths[-1], weights(0), kind="network", network=network, task={"name": task})
    assert_refused(tmp_path, r"expected the same task in all.*got several tasks.*merge method", paths)
    merge_checkpoints([paths[0]] * 2, tmp_path / "soup.safetensors", ratios=[1, 1])
    noted = load_checkpoint(tmp_path / "soup.safetensors").metadata
    assert (noted["network"], noted["task"]) == (network, {"name": "brats"})


def test_outputs_that_cannot_be_written(tmp_path, pair, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "dir.safetensors").mkdir()
    assert_refused(tmp_path, "full: expected a .safetensors file, or a new or empty folder", pair, out="full")
    assert_refused(tmp_path, "expected a file .got a folder", pair, out="dir.safetensors")
    assert_refused(tmp_path, "shards of 5 bytes: expected .* a folder", pair, shard_size=5)
    assert_refused(tmp_path, "shards of 0 bytes: expected more than 0", pair, shard_size=0, out="out")
    assert_refused(tmp_path, r"out: cannot be written \(Not a directory\)", pair, out="full/file/out")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    assert_refused(tmp_path, r"expected 0\.00 GB of room on the disk \(got 0\.00\)", pair)


@pytest.mark.parametrize("out", ["out.safetensors", "out"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_disk_that_fails_on_the_way(tmp_path, pair, monkeypatch, number, out):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwritev", fail)
    assert_refused(tmp_path, rf"{out}: cannot be written \({os.strerror(number)}\)", pair, out=out)


@pytest.mark.parametrize("out", ["out.safetensors", "out"])
def test_interruption_leaves_nothing(tmp_path, pair, out):
    def interrupt(done, total):
        raise KeyboardInterrupt

    before = set(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(pair, tmp_path / out, ratios=[1, 1], on_progress=interrupt)
    assert set(tmp_path.iterdir()) == before


def test_source_that_shrinks_on_the_way(tmp_path, pair, monkeypatch):
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    assert_refused(tmp_path, "expected .* bytes or more", pair)
