"""Files around a streamed merge: damage in the sources, links beside them, results of killed merges."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from streaming_samples import assert_refused, fisher_of, load, save, weights

from timm_ext.checkpoint import load_checkpoint, save_checkpoint
from timm_ext.errors import InputError
from timm_ext.files import sha256
from timm_ext.merging.streaming.merge import merge_checkpoints

NETWORK = {"name": "x", "in_channels": 1, "out_channels": 1, "options": {}}


def folder_of(path: Path, value: float, shards: int = 2) -> Path:
    path.mkdir()
    for number in range(1, shards + 1):
        tensors = {f"w{number}": torch.full((50, 40), value)}
        save_file(tensors, path / f"model-{number:05d}-of-{shards:05d}.safetensors")
    (path / "config.json").write_text("{}")
    return path


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [folder_of(tmp_path / f"m{value:g}", value) for value in (1.0, 3.0)]


def test_the_result_of_the_same_merge_may_be_there_already(tmp_path: Path, folders: list[Path]) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        merge_checkpoints(folders, out, ratios=[1, 1])
        assert load_file(out / "model-00001-of-00002.safetensors")["w1"].eq(2).all()
        assert {path.name for path in tmp_path.iterdir()} == {"m1", "m3", "out"}
    for change in (
        lambda: merge_checkpoints(folders, out, ratios=[1, 2]),  # another merge
        lambda: (out / "notes.txt").touch() or merge_checkpoints(folders, out, ratios=[1, 1]),
    ):
        with pytest.raises(InputError, match=r"out: expected a \.safetensors file, or a new or empty folder"):
            change()
    (out / "notes.txt").unlink()
    (out / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"out: expected a \.safetensors file, or a new or empty folder"):
        merge_checkpoints(folders, out, ratios=[1, 1])


KILLED = """
import os, signal, sys
from pathlib import Path
from timm_ext.merging.streaming import merge as streamed, result
def killed(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)
setattr(result if hasattr(result, sys.argv[1]) else streamed, sys.argv[1], killed)
streamed.merge_checkpoints([Path(p) for p in sys.argv[3:]], sys.argv[2], ratios=[1, 1])
"""


@pytest.mark.parametrize("step", ["merge_blocks", "copy_companions", "write_json", "StreamedMerge"])
def test_a_merge_goes_on_where_another_was_killed(tmp_path: Path, folders: list[Path], step: str) -> None:
    out = tmp_path / "parent" / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, step, out, *folders], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(out.parent.iterdir())) == 1  # the result, or what was to become it
    merge_checkpoints(folders, out, ratios=[1, 1])
    assert list(out.parent.iterdir()) == [out]
    assert load_file(out / "model-00002-of-00002.safetensors")["w2"].eq(2).all()


def test_links_that_lead_out_of_the_folder_are_left_out(tmp_path: Path, folders: list[Path]) -> None:
    (tmp_path / "secret.txt").write_text("of somebody else")
    (folders[0] / "real.txt").write_text("ours")
    (folders[0] / "inside.txt").symlink_to("real.txt")
    (folders[0] / "outside.txt").symlink_to(tmp_path / "secret.txt")
    (folders[0] / "broken.json").symlink_to("nowhere")
    (folders[0] / "folder.json").mkdir()
    os.mkfifo(folders[0] / "pipe.json")
    done = merge_checkpoints(folders, tmp_path / "out", ratios=[1, 1])
    assert done.left_out == ("outside.txt",)
    beside = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith("model")}
    assert beside == {"config.json", "inside.txt", "real.txt"}
    assert not (tmp_path / "out" / "inside.txt").is_symlink()


def test_a_snapshot_of_the_hugging_face_cache_is_whole(tmp_path: Path, folders: list[Path]) -> None:
    repository = tmp_path / "models--a--b"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folders[0].iterdir())):
        file.rename(repository / "blobs" / f"{number}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number}")
    (snapshot / "stolen.txt").symlink_to(tmp_path / "secret.txt")
    (tmp_path / "secret.txt").touch()
    done = merge_checkpoints([snapshot, folders[1]], tmp_path / "out", ratios=[1, 1])
    assert done.left_out == ("stolen.txt",)
    assert (tmp_path / "out" / "config.json").read_text() == "{}"
    assert load_file(tmp_path / "out" / "model-00001-of-00002.safetensors")["w1"].eq(2).all()


def test_merged_networks_hold_a_digest_and_further_names(tmp_path: Path) -> None:
    paths = []
    for value in (1.0, 3.0):
        paths.append(tmp_path / f"{value}.safetensors")
        tied = torch.full((100,), value)
        save_checkpoint(paths[-1], {"a": tied, "b": tied}, kind="network", network=NETWORK)
    out = tmp_path / "out.safetensors"
    merge_checkpoints(paths, out, ratios=[1, 1])
    got = load_checkpoint(out, kind="merged")
    assert got.tensors["b"] is got.tensors["a"]
    assert got.tensors["a"].eq(2).all()
    for path in (out, paths[1]):
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
        with pytest.raises(InputError, match="expected the bytes that were written"):
            load_checkpoint(path)
    with pytest.raises(InputError, match=r"3.0.safetensors: expected the bytes that were written"):
        merge_checkpoints(paths, tmp_path / "again.safetensors", ratios=[1, 1])
    save_checkpoint(paths[1], {"a": tied, "c": tied}, kind="network", network=NETWORK)
    with pytest.raises(InputError, match="the same further names"):
        merge_checkpoints(paths, tmp_path / "again.safetensors", ratios=[1, 1])


def test_results_of_other_programs_networks_keep_their_metadata(tmp_path: Path) -> None:
    paths = [tmp_path / f"{value}.safetensors" for value in (1, 3)]
    for path in paths:
        save_file({"w": torch.ones(3)}, path, metadata={"format": "pt", "modelspec.title": "ü"})
    merge_checkpoints(paths, tmp_path / "out.safetensors", ratios=[1, 1])
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        assert file.metadata()["modelspec.title"] == "ü"


def test_pytorch_files_are_merged_as_safetensors_are(tmp_path: Path) -> None:
    paths, fishers = [], []
    for seed in range(2):
        tensors = weights(seed)
        record = {"state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}, "epoch": seed}
        paths.append((tmp_path / f"m{seed}.ckpt", save(tmp_path / f"m{seed}.safetensors", tensors)))
        fishers.append((tmp_path / f"f{seed}.pt", save(tmp_path / f"f{seed}.safetensors", fisher_of(seed))))
        torch.save(record, paths[-1][0])
        torch.save(fisher_of(seed), fishers[-1][0])
    (theirs, ours), (their_fishers, our_fishers) = zip(*paths, strict=True), zip(*fishers, strict=True)
    out, again = tmp_path / "out.safetensors", tmp_path / "again.safetensors"
    before = set(tmp_path.iterdir())
    done = merge_checkpoints(theirs, out, ratios=[3, 1], fishers=their_fishers, hashes=True)
    assert set(tmp_path.iterdir()) == before | {out}
    merge_checkpoints([theirs[0], ours[1]], again, ratios=[3, 1], fishers=our_fishers)
    merge_checkpoints(ours, tmp_path / "ours.safetensors", ratios=[3, 1], fishers=our_fishers)
    expected = load(tmp_path / "ours.safetensors")
    for found in (load(out), load(again)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert done.notes[0] == f"{theirs[0]}: taken from 'state_dict'; 'module.' taken off the names"
    noted = load_checkpoint(out).metadata["merge"]["sources"]
    assert noted[0]["sha256"] == {"m0.ckpt": sha256(theirs[0])}


def test_tied_tensors_of_pytorch_files_stay_tied(tmp_path: Path) -> None:
    paths = []
    for value in (1.0, 3.0):
        tied = torch.full((4,), value)
        paths.append(tmp_path / f"{value}.bin")
        torch.save({"embed": tied, "head": tied}, paths[-1])
    merge_checkpoints(paths, tmp_path / "out.safetensors", ratios=[1, 1])
    assert load_checkpoint(tmp_path / "out.safetensors").tensors["head"].tolist() == [2.0] * 4


def test_folders_of_pytorch_shards(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for value, folder in enumerate(folders):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        for number, name in enumerate("uv", 1):
            file = folder / f"pytorch_model-{number:05d}-of-00002.bin"
            torch.save({name: torch.full((3,), float(value))}, file)
        torch.save({"state": 1}, folder / "optimizer.bin")
    merge_checkpoints(folders, tmp_path / "out", ratios=[1, 1])
    assert {name: tensor.tolist() for name, tensor in load(tmp_path / "out").items()} == {
        "u": [0.5] * 3,
        "v": [0.5] * 3,
    }
    assert (tmp_path / "out" / "config.json").is_file()
    (folders[1] / "pytorch_model-00002-of-00002.bin").unlink()
    assert_refused(tmp_path, "missing 1 of 2 shards", folders)


def test_bad_values_of_a_pytorch_file_are_told_by_its_name(tmp_path: Path) -> None:
    paths = [tmp_path / "a.pt", tmp_path / "b.pt"]
    torch.save({"w": torch.ones(3)}, paths[0])
    torch.save({"w": torch.tensor([1.0, float("nan"), 1.0])}, paths[1])
    assert_refused(tmp_path, rf"^{paths[1]}: expected finite weights", paths)
    paths[1].write_bytes(paths[1].read_bytes()[:300])
    assert_refused(tmp_path, rf"^{paths[1]}: expected a whole PyTorch file", paths)
