import json
import os
import pickle
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as options
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from timm_ext.checkpoint import check_replaced, describe, load_checkpoint, save_checkpoint
from timm_ext.errors import InputError
from timm_ext.files import sha256

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
tensors = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
    st.builds(
        lambda shape, dtype: (100 * torch.rand(shape)).to(dtype),
        st.lists(st.integers(0, 3), max_size=4).map(tuple),
        st.sampled_from(DTYPES),
    ),
    max_size=5,
)


@options(deadline=None)  # the first case imports what checks metadata
@given(tensors=tensors, settings=st.dictionaries(st.text(), st.integers() | st.text() | st.none()))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, tensors: dict, settings: dict) -> None:
    path = tmp_path_factory.mktemp("round") / "x.safetensors"
    digest = save_checkpoint(path, tensors, kind="other", settings=settings)
    got = load_checkpoint(path, kind="other")
    assert got.sha256 == digest == sha256(path)
    assert got.path == path
    assert got.metadata["settings"] == settings
    assert set(got.metadata["versions"]) == {"timm_ext", "torch"}
    assert got.tensors.keys() == tensors.keys()
    assert all(torch.equal(got.tensors[k], v) and got.tensors[k].dtype == v.dtype for k, v in tensors.items())


def test_every_length_of_header_is_read(tmp_path: Path) -> None:
    # The file starts with that length, whose first byte is at times that of a pickle.
    for extra in range(0, 300, 4):
        save_checkpoint(tmp_path / "x", {"w": torch.ones(1)}, kind="other", note="n" * extra)
        assert load_checkpoint(tmp_path / "x").kind == "other"


def test_tied_tensors_are_written_once_and_stay_tied(tmp_path: Path) -> None:
    weight = torch.rand(1000)
    save_checkpoint(tmp_path / "x", {"a": weight, "b": weight, "c": weight[:500]}, kind="network")
    assert (tmp_path / "x").stat().st_size < 7000
    got = load_checkpoint(tmp_path / "x").tensors
    assert got["a"] is got["b"]
    assert torch.equal(got["c"], weight[:500])


def test_strided_tensors_and_parameters_are_written(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.rand(3, 4))
    save_checkpoint(tmp_path / "x", {"w": weight, "t": weight.t(), "row": weight[:, 1]}, kind="network")
    got = load_checkpoint(tmp_path / "x").tensors
    assert torch.equal(got["t"], weight.t())
    assert torch.equal(got["row"], weight[:, 1])
    assert not got["w"].requires_grad


def test_loaded_tensors_do_not_change_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    save_checkpoint(path, {"w": torch.ones(5000)}, kind="network")
    got = load_checkpoint(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert (got.tensors["w"] == 1).all()


def test_wrong_kind_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "x", {"w": torch.ones(1)}, kind="network")
    with pytest.raises(InputError, match=r"x: expected a fisher checkpoint \(got network\)"):
        load_checkpoint(tmp_path / "x", kind="fisher")
    with pytest.raises(InputError, match=r"expected a fisher or bank checkpoint \(got network\)"):
        load_checkpoint(tmp_path / "x", kind=("fisher", "bank"))


def test_non_finite_weights_are_all_named(tmp_path: Path) -> None:
    bad = {
        "a": torch.tensor([1.0, float("nan"), float("inf")]),
        "b": torch.ones(2),
        "c": torch.tensor(float("-inf")),
    }
    save_checkpoint(tmp_path / "x", bad, kind="network")
    with pytest.raises(
        InputError, match=r"got 2 tensors that are not\)\n  a: 2 of 3 .*\n  c: 1 of 1"
    ) as error:
        load_checkpoint(tmp_path / "x")
    assert "b:" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 4, 20, 200, -1])
def test_truncated_safetensors_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, {"w": torch.ones(100)}, kind="network")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"x.safetensors: expected a whole safetensors file"):
        load_checkpoint(path)


@pytest.mark.parametrize("text", ["no json", "[]", '{"kind": 3}'])
def test_foreign_metadata_under_our_key_is_refused(tmp_path: Path, text: str) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "x", metadata={"timm_ext": text})
    with pytest.raises(InputError, match="expected metadata written by timm_ext"):
        load_checkpoint(tmp_path / "x")


def test_foreign_safetensors_counts_as_a_network(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "x")
    assert load_checkpoint(tmp_path / "x", kind="network").kind == "network"


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent: cannot be read \(No such file"):
        load_checkpoint(tmp_path / "absent")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s},
        lambda s: {"network_weights": s, "logging": {"ema": [np.float64(0.5), np.float32(1)]}},
        lambda s: {"state_dict": {f"module.{name}": tensor for name, tensor in s.items()}},
        lambda s: {f"module._orig_mod.{name}": tensor for name, tensor in s.items()},
    ],
)
@pytest.mark.parametrize("name", ["x.pt", "no_suffix"])
def test_usual_pytorch_files_are_read(tmp_path: Path, wrap: Callable[[dict], dict], name: str) -> None:
    state = nn.Conv3d(1, 2, 3).state_dict()
    torch.save(wrap(state), tmp_path / name)
    got = load_checkpoint(tmp_path / name, kind="network")
    assert got.tensors.keys() == state.keys()
    assert all(torch.equal(got.tensors[key], tensor) for key, tensor in state.items())
    assert got.sha256 == sha256(tmp_path / name)


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickle_with_code_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(pickle.dumps(Payload(tmp_path / "ran"), protocol=protocol))
    with pytest.raises(InputError, match=r"x.pt: expected (plain tensors|a whole PyTorch file)"):
        load_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_zipped_pickle_with_code_names_what_it_calls(tmp_path: Path) -> None:
    torch.save({"state_dict": Payload(tmp_path / "ran")}, tmp_path / "x.pth")
    with pytest.raises(
        InputError, match=r"expected plain tensors \(got a pickle that calls posix.system\); it was"
    ):
        load_checkpoint(tmp_path / "x.pth")
    assert not (tmp_path / "ran").exists()


def test_whole_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Conv3d(1, 1, 1), tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"got a pickle that calls torch.nn.modules.conv.Conv3d\)"):
        load_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("keep", [0, 100, -30])
def test_truncated_pytorch_file_is_refused(tmp_path: Path, keep: int) -> None:
    torch.save({"w": torch.ones(100)}, tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:keep])
    with pytest.raises(InputError, match=r"x.pt: expected a whole PyTorch file"):
        load_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], r"expected tensors by name \(got list\)"),
        ({}, r"expected tensors by name \(got dict\)"),
        ({"w": torch.ones(1), "epoch": 3}, r"expected tensors by name \(got something else under epoch\)"),
    ],
)
def test_pytorch_file_without_tensors_is_refused(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(InputError, match=message):
        load_checkpoint(tmp_path / "x.pt")


def test_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, {"w": torch.ones(1)}, kind="network")
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(InputError, match=r"x.safetensors: cannot be written \(.*File too large"):
            save_checkpoint(path, {"w": torch.ones(100_000)}, kind="network")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["x.safetensors"]
    assert path.read_bytes() == before


def test_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/x: cannot be written \("):
        save_checkpoint(tmp_path / "file" / "x", {}, kind="network")


def test_describe_is_json_with_the_facts(tmp_path: Path) -> None:
    path = tmp_path / "x"
    digest = save_checkpoint(
        path,
        {"w": torch.ones(2, 3), "n": torch.tensor(1)},
        kind="merged",
        parents=["0a"],
        task={"name": "brats"},
    )
    facts = json.loads(json.dumps(describe(load_checkpoint(path))))
    assert facts.pop("versions")["torch"] == torch.__version__
    assert facts == {
        "path": str(path),
        "kind": "merged",
        "sha256": digest,
        "bytes": path.stat().st_size,
        "tensors": 2,
        "elements": 7,
        "dtypes": {"float32": 1, "int64": 1},
        "parents": ["0a"],
        "task": {"name": "brats"},
    }


def test_a_file_of_another_kind_is_not_replaced(tmp_path):
    path = tmp_path / "a.safetensors"
    check_replaced(path, "fisher")
    save_checkpoint(path, {"w": torch.ones(2)}, kind="fisher")
    check_replaced(path, "fisher")
    with pytest.raises(InputError, match=r"expected no file, or a merged .* \(got a fisher\)"):
        check_replaced(path, "merged")
    save_file({"w": torch.ones(2)}, path)
    check_replaced(path, "merged")
    path.write_bytes(b"damaged")
    check_replaced(path, "merged")
