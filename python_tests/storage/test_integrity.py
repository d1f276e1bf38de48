"""Damage to files of tensors: what a checksum can tell is refused."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from timm_ext.checkpoint import load_checkpoint, save_checkpoint, versions
from timm_ext.errors import InputError
from timm_ext.files import sha256
from timm_ext.fisher import Fisher, FisherKind
from timm_ext.storage.integrity import BLANK


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_a_flipped_bit_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    weight = torch.rand(30)
    save_checkpoint(path, {"w": weight, "v": weight, "n": torch.arange(3)}, kind="network", note="é")
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(1)
    begin = whole.index(b"__metadata__")
    bits = {*range(8 * begin), *(rng.randrange(8 * header) for _ in range(300))}
    bits |= {rng.randrange(8 * header, 8 * len(whole)) for _ in range(100)}
    for bit in sorted(bits):
        path.write_bytes(whole)
        flip(path, bit)
        with pytest.raises(InputError) as error:
            load_checkpoint(path)
        assert "\n" not in str(error.value)


def test_damaged_fishers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    fisher = Fisher({"w": torch.rand(50)}, count=1, kind=FisherKind.BERNOULLI_TRUE, scaling="sum")
    fisher.save(path)
    flip(path, 8 * (path.stat().st_size - 100))
    with pytest.raises(InputError, match=r"f.safetensors: expected the bytes that were written"):
        Fisher.load(path)


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    weight = torch.rand(3)
    for name in ("x", "y"):
        save_checkpoint(tmp_path / name, {"a": weight, "b": weight}, kind="network", note=1)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_a_note_that_looks_like_the_digest_is_kept(tmp_path: Path) -> None:
    digest = save_checkpoint(tmp_path / "x", {"w": torch.ones(1)}, kind="other", note=BLANK)
    got = load_checkpoint(tmp_path / "x")
    assert got.metadata["note"] == BLANK
    assert got.sha256 == digest == sha256(tmp_path / "x")


def test_files_without_a_digest_are_read(tmp_path: Path) -> None:
    """As they were written before there was one."""
    about = f'{{"kind": "network", "versions": {{"torch": "{versions()["torch"]}"}}}}'
    metadata = {"timm_ext": about, "timm_ext.aliases": '{"b": "a"}'}
    save_file({"a": torch.ones(2)}, tmp_path / "x", metadata=metadata)
    got = load_checkpoint(tmp_path / "x", kind="network")
    assert got.tensors["b"] is got.tensors["a"]
    assert got.metadata.keys() == {"kind", "versions"}


@pytest.mark.parametrize(
    ("aliases", "message"),
    [('{"b": "c"}', "the tensor c, which has further names"), ('{"b": 1}', "aliases"), ("[1]", "aliases")],
)
def test_further_names_of_nothing_are_refused(tmp_path: Path, aliases: str, message: str) -> None:
    metadata = {"timm_ext": '{"kind": "network"}', "timm_ext.aliases": aliases}
    save_file({"a": torch.ones(2)}, tmp_path / "x", metadata=metadata)
    with pytest.raises(InputError, match=message):
        load_checkpoint(tmp_path / "x")


@pytest.mark.parametrize("at", ["data", "pickle"])
def test_a_flipped_bit_in_a_pytorch_archive_is_refused(tmp_path: Path, at: str) -> None:
    path = tmp_path / "x.pt"
    weight = torch.full((1000,), 1.5)
    torch.save({"w": weight}, path)
    data = path.read_bytes()
    place = data.index(weight.numpy().tobytes()) + 100 if at == "data" else data.index(b"_rebuild_tensor_v2")
    flip(path, 8 * place)
    with pytest.raises(InputError, match=r"x.pt: expected a whole PyTorch file \(got: Bad CRC-32"):
        load_checkpoint(path)


def test_an_archive_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(3)}, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(load_checkpoint(tmp_path / "x.pt").tensors["w"], torch.ones(3))
