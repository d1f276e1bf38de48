import errno
import fcntl
import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from streaming_samples import FLOATS, ROUNDING, fisher_of, load, save, weights

import timm_ext
from timm_ext.checkpoint import load_checkpoint
from timm_ext.errors import InputError
from timm_ext.merging.streaming.merge import merge_checkpoints
from timm_ext.merging.streaming.shards import INDEX, open_shards


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
        pair, tmp_path / "out.safetensors", ratios=[1, 1], on_progress=lambda *c: counts.append(c)
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
