import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from timm_ext.errors import InputError
from timm_ext.merging.streaming.shards import INDEX, index_of, open_shards, output_shards

TENSORS = {
    "b.weight": torch.arange(12.0).reshape(3, 4),
    "a.mask": torch.tensor([True, False, True]),
    "a.bias": torch.ones(5, dtype=torch.bfloat16),
    "a.scale": torch.tensor(2.0, dtype=torch.float64),
    "empty": torch.zeros(0, 3),
}


def save_folder(folder, *parts, index=True):
    folder.mkdir()
    names = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        names |= dict.fromkeys(part, file)
    if index:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def halves():
    names = list(TENSORS)
    return {n: TENSORS[n] for n in names[:2]}, {n: TENSORS[n] for n in names[2:]}


def bytes_of(place):
    return place.file.read_bytes()[place.begin : place.end]


def raw(tensor):
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@pytest.mark.parametrize("layout", ["file", "index", "folder"])
def test_every_tensor_is_found_where_it_lies(tmp_path, layout):
    path = tmp_path / "x.safetensors"
    if layout == "file":
        save_file(TENSORS, path, metadata={"format": "pt"})
    else:
        path = save_folder(tmp_path / "x", *halves(), index=layout == "index")
    shards = open_shards(path)
    assert shards.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert shards.tensors[name].shape == tuple(tensor.shape)
        assert bytes_of(shards.tensors[name]) == raw(tensor)
    assert shards.metadata == {"format": "pt"}
    assert shards.nbytes == sum(tensor.nbytes for tensor in TENSORS.values())


def test_only_tensors_of_the_index_count(tmp_path):
    """A folder may hold the same weights in another layout as well."""
    folder = save_folder(tmp_path / "x", *halves())
    save_file(TENSORS, folder / "consolidated.safetensors")
    assert {place.file.name for place in open_shards(folder).tensors.values()} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }


def write_raw(path, header, data=b""):
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(begin, end, *, dtype="F32", shape=(1,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(0, 4)}, b"123", r"file of \d+ bytes \(got \d+\)"),
        ({"a": entry(0, 4)}, b"12345", r"file of \d+ bytes \(got \d+\)"),
        ({"a": entry(0, 4, shape=(2,))}, b"1234", "damaged entry for a"),
        ({"a": entry(0, 4), "b": entry(2, 6)}, b"123456", "damaged entry for b"),
        ({"a": entry(0, 4), "b": entry(6, 10)}, b"1234567890", "damaged entry for b"),
        ({"a": {"dtype": "F32"}}, b"", "the shape None for a"),
        ({"a": entry(0, 4, shape=(-1, -1))}, b"1234", r"the shape \[-1, -1\] for a"),
        ({"a": entry(0, 4, shape=(1.0,))}, b"1234", r"the shape \[1.0\] for a"),
        ({"a": entry(0, 4, shape=("1",))}, b"1234", r"the shape \['1'\] for a"),
        ({"a": entry(0, 4, shape=(True,))}, b"1234", r"the shape \[True\] for a"),
        ({"a": entry(0, 4) | {"dtype": "F33"}}, b"1234", "the unknown type F33 for a"),
        ({"a": entry(0, 4) | {"dtype": ["F32"]}}, b"1234", "the unknown type"),
        ({"a": entry(0, 4) | {"data_offsets": [0]}}, b"1234", r"the place \[0\] for a"),
        ({"a": entry(0, 4) | {"data_offsets": [-4, 0]}}, b"", r"the place \[-4, 0\] for a"),
        ({"a": entry(4, 0, shape=(0,))}, b"1234", "damaged entry for a"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, b"1234", "damaged entry for b"),
        ({"a": entry(0, 4), "__metadata__": {"x": 1}}, b"1234", "metadata that are no texts"),
        ({"a": 3}, b"", "the unknown type None for a"),
        ([], b"", "a header without names"),
    ],
)
def test_damaged_files_are_refused(tmp_path, header, data, message):
    path = tmp_path / "x.safetensors"
    write_raw(path, header, data)
    with pytest.raises(InputError, match=rf"x\.safetensors: expected a whole safetensors .*{message}"):
        open_shards(path)


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 64])
def test_files_without_a_header_are_refused(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match="got no header"):
        open_shards(path)


def test_missing_files_and_tensors_are_listed(tmp_path):
    with pytest.raises(InputError, match="none: cannot be read"):
        open_shards(tmp_path / "none")
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match=r"bare: expected a checkpoint of \.safetensors files"):
        open_shards(tmp_path / "bare")
    for index in (True, False):
        folder = save_folder(tmp_path / f"cut{index}", *halves(), index=index)
        (folder / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(InputError, match=r"missing 1 of 2 shards\n  model-00002-of-00002"):
            open_shards(folder)
    folder = save_folder(tmp_path / "short", *halves())
    names = json.loads((folder / INDEX).read_text())
    names["weight_map"] |= dict.fromkeys(["lost.1", "lost.2"], "model-00001-of-00002.safetensors")
    (folder / INDEX).write_text(json.dumps(names))
    with pytest.raises(InputError, match=r"missing 2 tensors named in its index\n  lost.1 .*\n  lost.2 "):
        open_shards(folder)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": {"a": "../a.safetensors"}}'])
def test_index_without_files_beside_it(tmp_path, content):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(InputError, match="expected a weight_map from tensors to files beside it"):
        open_shards(tmp_path)


def test_several_indices_and_tensors_in_several_files(tmp_path):
    folder = save_folder(tmp_path / "twice", TENSORS, TENSORS, index=False)
    with pytest.raises(InputError, match="each tensor in one file"):
        open_shards(folder)
    for name in ("a", "b"):
        (folder / f"{name}.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match=r"one index of shards \(got a\.safetensors\.index\.json, b\."):
        open_shards(folder)


def test_companions_of_a_mac_are_no_shards(tmp_path):
    save_file(TENSORS, tmp_path / "weights.safetensors")
    for name in ("._weights.safetensors", "._weights.safetensors.index.json", ".DS_Store"):
        (tmp_path / name).write_bytes(bytes.fromhex("0005160700020000") + bytes(64))
    assert open_shards(tmp_path).tensors.keys() == TENSORS.keys()


def write_shard(folder, shard, source):
    """Write a file by itself, an oracle for the stream."""
    content = bytearray(shard.nbytes)
    content[: len(shard.header)] = shard.header
    for name, begin in shard.begins.items():
        data = bytes_of(source.tensors[name])
        content[begin : begin + len(data)] = data
    (folder / shard.name).write_bytes(content)


@pytest.mark.parametrize("shard_size", [None, 20, 48, 10**9])
def test_output_shards_are_read_by_safetensors(tmp_path, shard_size):
    save_file(TENSORS, tmp_path / "x.safetensors")
    source = open_shards(tmp_path / "x.safetensors")
    shards = output_shards(source, None, shard_size, {"format": "pt"})
    (tmp_path / "out").mkdir()
    found = {}
    for shard in shards:
        write_shard(tmp_path / "out", shard, source)
        with safe_open(tmp_path / "out" / shard.name, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            assert file.metadata() == {"format": "pt"}
        if shard_size is not None and len(shard.begins) > 1:
            assert shard.nbytes - len(shard.header) <= shard_size
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    index = index_of(shards)
    assert index["metadata"]["total_size"] == source.nbytes
    assert index["weight_map"] == {name: shard.name for shard in shards for name in shard.begins}


def test_wide_types_come_first_so_that_all_are_aligned(tmp_path):
    header = {"mask": entry(0, 3, dtype="BOOL", shape=(3,)), "x": entry(3, 11, dtype="F64")}
    write_raw(tmp_path / "x.safetensors", header, b"12312345678")
    (shard,) = output_shards(open_shards(tmp_path / "x.safetensors"), "y.safetensors", None, {})
    assert shard.begins["x"] % 8 == 0
    assert shard.begins["mask"] == shard.begins["x"] + 8
