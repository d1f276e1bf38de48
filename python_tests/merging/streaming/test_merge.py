import errno
import fcntl
import hashlib
import json
import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import timm_ext
from timm_ext.checkpoint import load_checkpoint, save_checkpoint
from timm_ext.errors import InputError
from timm_ext.merging.streaming import blocks
from timm_ext.merging.streaming.merge import merge_checkpoints
from timm_ext.merging.streaming.shards import INDEX, open_shards

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ROUNDING = {torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float64: 2**-50}
SHAPES = {"embed.weight": (301, 40), "layers.0.weight": (64, 33), "layers.0.norm": (33,), "scale": ()}


def weights(seed, dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return drawn | {"position_ids": torch.arange(7), "mask": torch.tensor([True, False])}


def fisher_of(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(100 + seed)
    drawn = {name: torch.rand(shape, generator=generator) for name, shape in SHAPES.items()}
    return {name: (value * (value > 0.3)).to(dtype) for name, value in drawn.items()}  # with zeros


def save(path, tensors, *, shards=1, metadata=None):
    """Save as a file, or as a folder with an index."""
    if shards == 1:
        save_file(tensors, path, metadata=metadata)
        return path
    path.mkdir()
    names = list(tensors)
    bounds = [round(i * len(names) / shards) for i in range(shards + 1)]
    files = {}
    for number, (first, last) in enumerate(pairwise(bounds), start=1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names[first:last]}, path / file, metadata={"format": "pt"})
        files |= dict.fromkeys(names[first:last], file)
    (path / INDEX).write_text(json.dumps({"weight_map": files}))
    return path


def load(path):
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def expected_of(models, ratios, fishers=None):
    """The formula in float64, by name."""
    result = {}
    for name, first in models[0].items():
        if not first.is_floating_point():
            result[name] = first
            continue
        theta = torch.stack([model[name].double() for model in models])
        alpha = torch.tensor(ratios, dtype=torch.float64).reshape(-1, *[1] * first.ndim)
        fisher = torch.stack([f[name].double() for f in fishers]) if fishers else torch.ones_like(theta)
        weight = torch.where((alpha * fisher).sum(0) > 0, alpha * fisher, alpha)
        result[name] = ((weight * theta).sum(0) / weight.sum(0)).to(first.dtype)
    return result


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks and chunks so small that tensors are cut at many places."""
    monkeypatch.setattr(blocks, "BLOCK", 4096)
    monkeypatch.setattr(blocks, "CHUNK", 1024)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("ratios", [[1.0], [0.7, 0.3], [1.0, 2.0, 0.0]], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_merge_is_the_weighted_mean(tmp_path, dtype, ratios, weighted):
    models = [weights(t, dtype) for t in range(len(ratios))]
    sources = [save(tmp_path / f"{t}.safetensors", model) for t, model in enumerate(models)]
    fishers = [fisher_of(t, dtype) for t in range(len(ratios))] if weighted else []
    files = [save(tmp_path / f"f{t}.safetensors", fisher) for t, fisher in enumerate(fishers)]
    out = tmp_path / "out.safetensors"
    done = merge_checkpoints(sources, out, ratios=ratios, fishers=files)
    merged, expected = load(out), expected_of(models, ratios, fishers)
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        assert merged[name].dtype == value.dtype
        torch.testing.assert_close(merged[name], value, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
    assert done.copied == tuple(
        name for name in open_shards(sources[0]).tensors if name in ("position_ids", "mask")
    )
    assert done.without_fisher == ()
    assert done.nbytes_written == sum(tensor.nbytes for tensor in models[0].values())


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_cutting_and_workers_do_not_change_a_bit(tmp_path, dtype):
    models = [weights(t, dtype) for t in range(3)]
    sources = [save(tmp_path / f"m{t}", model, shards=t + 1) for t, model in enumerate(models)]
    ratios = torch.tensor([[0.2, 0.5, 0.3]])
    written = set()
    for workers in (1, 4):
        out = tmp_path / f"out{workers}.safetensors"
        merge_checkpoints(sources, out, ratios=ratios[0].tolist(), workers=workers)
        written.add(out.read_bytes())
    assert len(written) == 1
    for name, merged in load(out).items():
        if merged.is_floating_point():
            theta = torch.stack([model[name].flatten() for model in models])
            whole = timm_ext.fused_merge(
                theta, None, ratios, torch.tensor([0, theta.shape[1]]), mixing="ratios"
            )
            assert torch.equal(merged.flatten(), whole), name


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("dtype", "of_fisher"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)]
)
def test_fisher_of_another_type(tmp_path, dtype, of_fisher):
    """Half-precision weights with float32 Fishers, whose values half precision could not hold."""
    models = [weights(t, dtype) for t in range(2)]
    fishers = [{name: value * 1e-30 for name, value in fisher_of(t, of_fisher).items()} for t in range(2)]
    paths = [save(tmp_path / f"m{t}.safetensors", model) for t, model in enumerate(models)]
    files = [save(tmp_path / f"f{t}.safetensors", fisher) for t, fisher in enumerate(fishers)]
    merge_checkpoints(paths, tmp_path / "out.safetensors", ratios=[1, 1], fishers=files)
    merged = load(tmp_path / "out.safetensors")
    for name, value in expected_of(models, [1, 1], fishers).items():
        torch.testing.assert_close(merged[name], value, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


def test_tensors_without_any_fisher_are_merged_by_ratios(tmp_path):
    models = [weights(t) for t in range(2)]
    fishers = [fisher_of(t) for t in range(2)]
    for fisher in fishers:
        del fisher["layers.0.norm"]
    paths = [save(tmp_path / f"m{t}.safetensors", model) for t, model in enumerate(models)]
    files = [save(tmp_path / f"f{t}.safetensors", fisher) for t, fisher in enumerate(fishers)]
    done = merge_checkpoints(paths, tmp_path / "out.safetensors", ratios=[0.9, 0.1], fishers=files)
    assert done.without_fisher == ("layers.0.norm",)
    name = "layers.0.norm"
    torch.testing.assert_close(
        load(tmp_path / "out.safetensors")[name], 0.9 * models[0][name] + 0.1 * models[1][name]
    )


@pytest.mark.parametrize("shard_size", [None, 20_000])
def test_folder_has_the_layout_of_the_first_source(tmp_path, shard_size):
    models = [weights(t) for t in range(2)]
    first = save(tmp_path / "a", models[0], shards=3)
    (first / "config.json").write_text('{"model_type": "x"}')
    (first / "pytorch_model.bin").write_bytes(b"weights")
    second = save(tmp_path / "b.safetensors", models[1])
    out = tmp_path / "new" / "out"
    merge_checkpoints([first, second], out, ratios=[0.5, 0.5], shard_size=shard_size)
    assert (out / "config.json").read_text() == '{"model_type": "x"}'
    assert not (out / "pytorch_model.bin").exists()
    names = json.loads((out / INDEX).read_text())["weight_map"]
    if shard_size is None:
        assert names == json.loads((first / INDEX).read_text())["weight_map"]
    for name, file in names.items():
        assert name in load_file(out / file)
    with safe_open(out / names["scale"], framework="pt") as file:
        assert file.metadata()["format"] == "pt"
    assert set(out.iterdir()) == {out / "config.json", out / INDEX, *(out / file for file in names.values())}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    merged = load(out)
    for name, value in expected_of(models, [0.5, 0.5]).items():
        torch.testing.assert_close(merged[name], value)


def test_provenance_and_hashes(tmp_path):
    sources = [
        save(tmp_path / f"m{t}.safetensors", weights(t), metadata={"format": "pt", "x": "y"}) for t in (0, 1)
    ]
    out = tmp_path / "out.safetensors"
    merge_checkpoints(sources, out, ratios=[3, 1], hashes=True)
    checkpoint = load_checkpoint(out)
    assert checkpoint.kind == "merged"
    noted = checkpoint.metadata["merge"]
    assert noted["method"] == "linear"
    assert noted["ratios"] == [3, 1]
    for source, about in zip(sources, noted["sources"], strict=True):
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        assert about["name"] == source.name
        assert about["sha256"] == {source.name: digest}
    with safe_open(out, framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        assert file.metadata()["x"] == "y"


@pytest.fixture
def pair(tmp_path):
    """Two checkpoints that fit, in files."""
    return [save(tmp_path / f"m{t}.safetensors", weights(t)) for t in range(2)]


def refused(tmp_path, match, sources, *, ratios=(1, 1), out="out.safetensors", **options):
    """A merge that must fail and leave nothing behind."""
    before = set(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=match):
        merge_checkpoints(sources, tmp_path / out, ratios=ratios, **options)
    assert set(tmp_path.rglob("*")) == before


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
    refused(tmp_path, f"ratios: expected {message}|ratios: .*{message}", pair, ratios=ratios)


def test_all_tensors_that_differ_are_listed(tmp_path, pair):
    other = weights(1)
    del other["scale"]
    other["embed.weight"] = other["embed.weight"][1:].clone()
    other["layers.0.weight"] = other["layers.0.weight"].bfloat16()
    other["more"] = torch.zeros(2)
    save_file(other, pair[1])
    refused(
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
    refused(
        tmp_path,
        r"(?s)integers and booleans in all of them \(got 2 that differ\).*(mask|position_ids)",
        pair,
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_of_counters_the_largest_is_taken(tmp_path, small_blocks, dtype):
    counts = [torch.tensor(n, dtype=dtype) for n in (3, 200, 7)]
    many = [torch.full((1000,), n, dtype=dtype) for n in (9, 8, 100)]
    models = [
        {"norm.running_mean": torch.rand(4), "norm.num_batches_tracked": n, "more.num_batches_tracked": m}
        for n, m in zip(counts, many, strict=True)
    ]
    paths = [save(tmp_path / f"{i}.safetensors", model) for i, model in enumerate(models)]
    done = merge_checkpoints(paths, tmp_path / "out.safetensors", ratios=(1, 2, 1))
    got = load(tmp_path / "out.safetensors")
    assert got["norm.num_batches_tracked"] == 200
    assert got["norm.num_batches_tracked"].dtype == dtype
    assert torch.equal(got["more.num_batches_tracked"], many[2])
    mean = sum(r / 4 * model["norm.running_mean"] for r, model in zip((1, 2, 1), models, strict=True))
    torch.testing.assert_close(got["norm.running_mean"], mean)
    assert set(done.counters) == {"norm.num_batches_tracked", "more.num_batches_tracked"}
    assert done.copied == done.without_fisher == ()
    assert done.nbytes_read == sum(t.nbytes for model in models for t in model.values())


def test_eight_bit_numbers_are_taken_where_they_agree(tmp_path):
    model = {"w": torch.randn(8, 8).to(torch.float8_e4m3fn), "scale": torch.rand(8)}
    paths = [
        save(tmp_path / f"{i}.safetensors", model | {"scale": torch.full((8,), i + 1.0)}) for i in (0, 1)
    ]
    merge_checkpoints(paths, tmp_path / "out.safetensors", ratios=(1, 1))
    got = load(tmp_path / "out.safetensors")
    assert torch.equal(got["w"].float(), model["w"].float())
    assert torch.equal(got["scale"], torch.full((8,), 1.5))
    save(tmp_path / "1.safetensors", model | {"w": torch.zeros(8, 8).to(torch.float8_e4m3fn)})
    with pytest.raises(InputError, match=r"expected weights of 16 bits or more.*F8_E4M3.*convert"):
        merge_checkpoints(paths, tmp_path / "out.safetensors", ratios=(1, 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path, pair, value):
    other = weights(1)
    other["layers.0.weight"][3, 4] = value
    save_file(other, pair[1])
    refused(
        tmp_path, r"m1\.safetensors: expected finite weights.*1 or more elements of layers\.0\.weight", pair
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_masks_of_infinities_and_huge_weights_pass(tmp_path, dtype):
    """What is the same in all models stays as it is; and a sum beyond the range is no infinite weight."""
    largest = torch.finfo(dtype).max
    models = [{"x": torch.tensor([float("-inf"), t, largest, largest], dtype=dtype)} for t in (1.0, 3.0)]
    paths = [save(tmp_path / f"m{t}.safetensors", model) for t, model in enumerate(models)]
    merge_checkpoints(paths, tmp_path / "out.safetensors", ratios=[1, 1])
    assert load(tmp_path / "out.safetensors")["x"].tolist() == [
        float("-inf"),
        2.0,
        *models[0]["x"][2:].tolist(),
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e-3])
def test_fisher_values(tmp_path, pair, value):
    fishers = [fisher_of(t) for t in range(2)]
    fishers[1]["embed.weight"][300, 39] = value
    files = [save(tmp_path / f"f{t}.safetensors", fisher) for t, fisher in enumerate(fishers)]
    message = r"f1\.safetensors: expected a finite, non-negative Fisher .*1 or more elements of embed\.weight"
    refused(tmp_path, message, pair, fishers=files)


def test_fishers_that_do_not_fit(tmp_path, pair):
    fishers = [fisher_of(t) for t in range(2)]
    del fishers[0]["scale"]
    fishers[1]["embed.weight"] = torch.zeros(3)
    fishers[1]["layers.0.norm"] = fishers[1]["layers.0.norm"].double()
    for fisher in fishers:
        fisher |= {"unknown": torch.zeros(1), "mask": torch.zeros(2)}
    files = [save(tmp_path / f"f{t}.safetensors", fisher) for t, fisher in enumerate(fishers)]
    refused(
        tmp_path,
        r"(?s)fishers: .*\(got 5 that do not fit\)(?=.*scale: )(?=.*embed.weight: )(?=.*layers.0.norm: )"
        r"(?=.*unknown: expected none)(?=.*mask: expected none)",
        pair,
        fishers=files,
    )
    refused(tmp_path, "fishers: expected one for each of 2", pair, fishers=files[:1])
    nothing = save(tmp_path / "nothing.safetensors", {})
    refused(tmp_path, "expected a Fisher .got no tensor", pair, fishers=[nothing] * 2)


def test_kinds_are_told_apart(tmp_path, pair):
    tensors = fisher_of(0)
    save_checkpoint(
        tmp_path / "f.safetensors", tensors, kind="fisher", provenance={"network_sha256": "0" * 64}
    )
    save_checkpoint(tmp_path / "n.safetensors", tensors, kind="network")
    fisher, network = tmp_path / "f.safetensors", tmp_path / "n.safetensors"
    refused(tmp_path, "f.safetensors: expected a network", [fisher, fisher])
    refused(tmp_path, "n.safetensors: expected a Fisher", [network] * 2, fishers=[network] * 2)
    refused(tmp_path, "expected the Fisher of .*n.safetensors", [network] * 2, fishers=[fisher] * 2)


def test_networks_of_other_tasks_are_not_merged_as_they_are(tmp_path):
    paths, network = [], {"name": "x", "in_channels": 1, "out_channels": 1, "options": {}}
    for task in ("brats", "parcellation"):
        paths.append(tmp_path / f"{task}.safetensors")
        save_checkpoint(paths[-1], weights(0), kind="network", network=network, task={"name": task})
    refused(tmp_path, r"expected the same task in all.*got several tasks.*merge method", paths)
    merge_checkpoints([paths[0]] * 2, tmp_path / "soup.safetensors", ratios=[1, 1])
    noted = load_checkpoint(tmp_path / "soup.safetensors").metadata
    assert (noted["network"], noted["task"]) == (network, {"name": "brats"})


def test_outputs_that_cannot_be_written(tmp_path, pair, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "dir.safetensors").mkdir()
    refused(tmp_path, "full: expected a .safetensors file, or a new or empty folder", pair, out="full")
    refused(tmp_path, "expected a file .got a folder", pair, out="dir.safetensors")
    refused(tmp_path, "shards of 5 bytes: expected .* a folder", pair, shard_size=5)
    refused(tmp_path, "shards of 0 bytes: expected more than 0", pair, shard_size=0, out="out")
    refused(tmp_path, r"out: cannot be written \(Not a directory\)", pair, out="full/file/out")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    refused(tmp_path, r"expected 0\.00 GB of room on the disk \(got 0\.00\)", pair)


@pytest.mark.parametrize("out", ["out.safetensors", "out"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_disk_that_fails_on_the_way(tmp_path, pair, monkeypatch, number, out):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwritev", fail)
    refused(tmp_path, rf"{out}: cannot be written \({os.strerror(number)}\)", pair, out=out)


@pytest.mark.parametrize("out", ["out.safetensors", "out"])
def test_interruption_leaves_nothing(tmp_path, pair, out):
    def interrupt(done, total):
        raise KeyboardInterrupt

    before = set(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(pair, tmp_path / out, ratios=[1, 1], progress=interrupt)
    assert set(tmp_path.iterdir()) == before


def test_source_that_shrinks_on_the_way(tmp_path, pair, monkeypatch):
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    refused(tmp_path, "expected .* bytes or more", pair)


@pytest.mark.usefixtures("small_blocks")
def test_file_systems_without_unbuffered_writes(tmp_path, pair, monkeypatch):
    """Those that accept the flag and refuse the write get buffered writes."""
    expected = tmp_path / "expected.safetensors"
    merge_checkpoints(pair, expected, ratios=[1, 2])
    write = os.pwritev
    refusals = []

    def pwritev(descriptor, buffers, offset):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            refusals.append(descriptor)
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(descriptor, [buffers[0][:1000]], offset)  # and writes that are cut short

    monkeypatch.setattr(os, "pwritev", pwritev)
    merge_checkpoints(pair, tmp_path / "out.safetensors", ratios=[1, 2])
    assert (tmp_path / "out.safetensors").read_bytes() == expected.read_bytes()


def test_progress_and_threads(tmp_path, pair):
    counts = []
    threads = torch.get_num_threads()
    done = merge_checkpoints(
        pair, tmp_path / "out.safetensors", ratios=[1, 1], progress=lambda *c: counts.append(c)
    )
    assert counts[-1] == (done.nbytes_read, done.nbytes_read)
    assert torch.get_num_threads() == threads


MEMORY = """
import resource, sys
from timm_ext.merging.streaming.merge import merge_checkpoints
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
merge_checkpoints(sys.argv[1:3], sys.argv[3] + "small.safetensors", ratios=[1, 1], workers=2)
before = peak()
merge_checkpoints(sys.argv[4:6], sys.argv[3] + "large.safetensors", ratios=[1, 1], workers=2)
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_tensors(tmp_path):
    sizes = {"small": 4 << 20, "large": 128 << 20}  # of one tensor
    files = []
    for size, nbytes in sizes.items():
        for t in range(2):
            files.append(
                save(tmp_path / f"{size}{t}.safetensors", {"x": torch.full((nbytes // 2,), t).bfloat16()})
            )
    arguments = [*map(str, files[:2]), f"{tmp_path}/", *map(str, files[2:])]
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, *arguments], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 32 << 20
