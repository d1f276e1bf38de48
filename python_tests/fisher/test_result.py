import math

import pytest
import torch

from timm_ext.checkpoint import load_checkpoint, save_checkpoint
from timm_ext.errors import InputError
from timm_ext.fisher import Fisher, FisherKind


def fisher(**change):
    fields = {
        "tensors": {"a.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "a.bias": torch.zeros(2)},
        "count": 7,
        "kind": FisherKind.DICE_SAMPLED,
        "scaling": "sum",
        "zero": ("a.bias",),
        "samples": 3,
        "seed": 5,
    }
    return Fisher(**(fields | change))


def test_save_and_load(tmp_path):
    path = tmp_path / "fisher.safetensors"
    digest = fisher().save(
        path, network_sha256="ab12", task={"name": "brats"}, settings={"precision": "ieee"}
    )
    assert len(digest) == 64
    got = Fisher.load(path)
    assert {name: t.tolist() for name, t in got.tensors.items()} == {
        "a.weight": [[1, 2], [3, 4]], "a.bias": [0, 0]
    }  # fmt: skip
    assert (got.count, got.kind, got.scaling, got.zero, got.samples, got.seed) == (
        7, FisherKind.DICE_SAMPLED, "sum", ("a.bias",), 3, 5
    )  # fmt: skip
    assert got.metadata == {
        "network_sha256": "ab12", "task": {"name": "brats"}, "settings": {"precision": "ieee"}
    }  # fmt: skip


def test_provenance_survives_a_second_save(tmp_path):
    path = tmp_path / "fisher.safetensors"
    fisher().save(path, network_sha256="ab12")
    Fisher.load(path).save(path, task={"name": "brats"})
    assert Fisher.load(path).metadata == {"network_sha256": "ab12", "task": {"name": "brats"}}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": torch.tensor([1.0, math.nan])}, "got 1 tensors that are not.\n  a: NaN or infinite"),
        ({"a": torch.tensor([math.inf]), "b": torch.tensor([-1.0])}, "a: NaN or infinite\n  b: negative"),
    ],
)
def test_bad_values_are_refused(tmp_path, tensors, message):
    path = tmp_path / "fisher.safetensors"
    with pytest.raises(InputError, match=message):
        fisher(tensors=tensors, zero=()).save(path)
    assert not path.exists()
    about = {"kind": "bernoulli-true", "count": 1, "scaling": "", "zero": [], "samples": 1, "seed": None}
    save_checkpoint(path, tensors, kind="fisher", fisher=about)
    with pytest.raises(InputError, match=message):
        Fisher.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "gauss-true"}, r"safetensors: metadata: kind: .*gauss-true"),
        ({"count": None}, r"metadata: count: .* \(got None\)"),
        ({"count": 0}, r"expected counts of at least 1 \(got 0 and 1\)"),
        ({"count": "7"}, r"metadata: count: .* \(got '7'\)"),
        ({"count": True}, r"metadata: count: .* \(got True\)"),
        ({"scaling": 3}, r"metadata: scaling: .* \(got 3\)"),
        ({"seed": 0.5}, r"metadata: seed: .* \(got 0.5\)"),
        ({"zero": "a"}, r"metadata: zero: .* \(got 'a'\)"),
        ({"zero": [1]}, r"metadata: zero\.0: .* \(got 1\)"),
        ({"zero": ["c"]}, "expected tensors for all of zero .got none for c"),
        ({"unused": ["c"]}, "expected tensors for all of unused .got none for c"),
    ],
)
def test_bad_metadata_is_refused(tmp_path, change, message):
    path = tmp_path / "fisher.safetensors"
    about = {"kind": "bernoulli-true", "count": 1, "scaling": "", "zero": [], "samples": 1, "seed": None}
    save_checkpoint(path, {"a": torch.ones(1)}, kind="fisher", fisher=about | change)
    with pytest.raises(InputError, match=message):
        Fisher.load(path)


@pytest.mark.parametrize("about", [None, [], "fisher", 3, {}])
def test_missing_metadata_are_refused(tmp_path, about):
    path = tmp_path / "fisher.safetensors"
    save_checkpoint(path, {"a": torch.ones(1)}, kind="fisher", fisher=about)
    with pytest.raises(InputError, match=r"fisher\.safetensors: metadata"):
        Fisher.load(path)


def test_odd_tensors_are_refused(tmp_path):
    path = tmp_path / "fisher.safetensors"
    about = {"kind": "bernoulli-true", "count": 1, "scaling": "", "zero": [], "samples": 1, "seed": None}
    for tensors, message in (
        ({"a": torch.ones(1, dtype=torch.int64)}, r"a: of type torch\.int64"),
        ({"a": torch.ones(1, dtype=torch.bool)}, r"a: of type torch\.bool"),
        ({"a": torch.ones(1).to(torch.float8_e4m3fn)}, r"a: of type torch\.float8_e4m3fn"),
        ({}, r"expected a Fisher of some tensors \(got none\)"),
    ):
        save_checkpoint(path, tensors, kind="fisher", fisher=about)
        with pytest.raises(InputError, match=message):
            Fisher.load(path)
    save_checkpoint(path, {"a": torch.ones(1)}, kind="fisher", fisher=about, provenance=["x"])
    with pytest.raises(InputError, match=r"expected a mapping as provenance"):
        Fisher.load(path)


def test_unused_parameters_are_noted(tmp_path):
    path = tmp_path / "fisher.safetensors"
    name = next(iter(fisher().tensors))
    fisher(unused=(name,)).save(path)
    assert Fisher.load(path).unused == (name,)


def test_another_kind_of_file_is_refused(tmp_path):
    path = tmp_path / "network.safetensors"
    save_checkpoint(path, {"a": torch.ones(1)}, kind="network")
    with pytest.raises(InputError, match="fisher"):
        Fisher.load(path)


def test_kinds():
    assert FisherKind.of("bernoulli", "true") is FisherKind.BERNOULLI_TRUE
    assert FisherKind.of("my own", "sampled") is FisherKind.CUSTOM_SAMPLED
    assert FisherKind.DICE_TRUE == "dice-true"


def test_written_file_is_a_fisher_checkpoint(tmp_path):
    path = tmp_path / "fisher.safetensors"
    fisher().save(path)
    assert load_checkpoint(path, kind="fisher").metadata["fisher"]["count"] == 7
