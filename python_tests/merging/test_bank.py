from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import timm_ext
from timm_ext.checkpoint import describe, load_checkpoint, save_checkpoint
from timm_ext.errors import InputError
from timm_ext.layout import Layout
from timm_ext.merging.bank import Bank
from timm_ext.ops import reference

NAN, INF = float("nan"), float("inf")


@dataclass
class FisherStub:
    tensors: dict[str, Tensor]
    zero: tuple[str, ...] = ()
    scaling: str = "sum"
    count: int = 1
    kind: str = "stub"
    metadata: dict[str, object] = field(default_factory=dict)


def tensors(**values: list[float]) -> dict[str, Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


M1, M2 = tensors(a=[1.0, 2.0], b=[3.0]), tensors(a=[5.0, 6.0], b=[7.0])
LAYOUT = Layout.from_tensors(M1)


def fishers(**second: list[float]) -> list[FisherStub]:
    return [
        FisherStub(tensors(a=[1.0, 3.0], b=[4.0])),
        FisherStub(tensors(**{"a": [2.0, 2.0], "b": [0.0], **second})),
    ]


def test_rows_are_the_models_in_order() -> None:
    bank = Bank.build({"M1": M1, "M2": {**M2, "head": torch.zeros(9)}}, fishers(), LAYOUT)
    assert bank.sources == ("M1", "M2")
    assert bank.theta.tolist() == [[1, 2, 3], [5, 6, 7]]
    assert bank.fisher.tolist() == [[1, 3, 4], [2, 2, 0]]
    assert bank.theta.dtype == torch.float32


def test_sources_are_not_changed_or_kept() -> None:
    model, fisher = tensors(a=[1.0, 2.0], b=[3.0]), fishers()[0]
    bank = Bank.build({"M1": model}, [fisher], LAYOUT, normalize="tensor")
    model["a"].zero_()
    assert bank.theta.tolist() == [[1, 2, 3]]
    assert fisher.tensors["a"].tolist() == [1, 3]


@pytest.mark.parametrize("elements", [1, 64, 65, 1024, 1_000_003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_padded_against_aliasing(elements: int, dtype: torch.dtype) -> None:
    model = {"a": torch.zeros(elements)}
    bank = Bank.build({"M1": model, "M2": model}, None, Layout.from_tensors(model), dtype=dtype)
    stride = bank.theta.stride(0)
    assert bank.theta.shape == (2, elements)
    assert elements <= stride <= elements + 128
    assert stride % 64 == 0
    assert stride * dtype.itemsize % 4096 != 0


def test_structural_zeros_get_the_plain_mean() -> None:
    pair = fishers()
    pair[1].zero = ("b", "not in the layout")
    bank = Bank.build({"M1": M1, "M2": M2}, pair, LAYOUT)
    assert bank.fisher.tolist() == [[1, 3, 1], [2, 2, 1]]


def test_normalized_by_tensor_sums() -> None:
    bank = Bank.build({"M1": M1, "M2": M2}, fishers(), LAYOUT, normalize="tensor")
    # b sums to 0 in M2: the plain mean there.
    assert bank.fisher.tolist() == [[0.25, 0.75, 1], [0.5, 0.5, 1]]


def test_normalized_by_model_sums() -> None:
    bank = Bank.build({"M1": M1, "M2": M2}, fishers(), LAYOUT, normalize="model")
    assert bank.fisher.tolist() == [[0.125, 0.375, 0.5], [0.5, 0.5, 0]]


def test_structural_zeros_do_not_count_in_model_sums() -> None:
    pair = fishers()
    pair[0].zero = ("b",)
    bank = Bank.build({"M1": M1, "M2": M2}, pair, LAYOUT, normalize="model")
    assert bank.fisher.tolist() == [[0.25, 0.75, 1], [0.5, 0.5, 1]]


def test_shares_add_up_to_one_and_zeros_stay_zero() -> None:
    pair = fishers(a=[3.0, 0.0])
    pair[0].tensors["a"][1] = 0
    bank = Bank.build({"M1": M1, "M2": M2}, pair, LAYOUT, fisher_storage="shares")
    assert bank.fisher_storage == "shares"
    assert bank.fisher.tolist() == [[0.25, 0, 1], [0.75, 0, 0]]


def test_shares_come_after_normalizing() -> None:
    bank = Bank.build({"M1": M1, "M2": M2}, fishers(), LAYOUT, normalize="tensor", fisher_storage="shares")
    torch.testing.assert_close(bank.fisher, torch.tensor([[1 / 3, 0.6, 0.5], [2 / 3, 0.4, 0.5]]))


def test_shares_of_structural_zeros_are_equal() -> None:
    pair = fishers()
    pair[0].zero = ("a",)
    bank = Bank.build({"M1": M1, "M2": M2}, pair, LAYOUT, fisher_storage="shares")
    assert bank.fisher.tolist() == [[0.5, 0.5, 1], [0.5, 0.5, 0]]


@pytest.mark.parametrize(
    ("dtype", "storage"),
    [(torch.float32, "raw"), (torch.float64, "raw"), (torch.bfloat16, "shares"), (torch.float16, "shares")],
)
def test_half_precision_stores_shares(dtype: torch.dtype, storage: str) -> None:
    bank = Bank.build({"M1": M1, "M2": M2}, fishers(), LAYOUT, dtype=dtype)
    assert bank.fisher_storage == storage
    assert bank.without_fisher().fisher_storage is None
    assert Bank.build({"M1": M1, "M2": M2}, None, LAYOUT, dtype=dtype).fisher_storage is None


def extreme_bank(
    models: int, storage: str, dtype: torch.dtype = torch.float32
) -> tuple[Bank, Tensor, Tensor]:
    """Fishers from 1e-41 to 1e38, half of them 0: the bank, the Fishers and logits for segments of 1000."""
    generator = torch.Generator().manual_seed(models)
    shape = (models, 50_000)
    exponent = torch.rand(shape, generator=generator, dtype=torch.float64) * 79 - 41
    fisher = (10**exponent).float() * (torch.rand(shape, generator=generator) < 0.5)
    theta = torch.randn(shape, generator=generator)
    logits = torch.randn(50, models, generator=generator)
    bank = Bank.build(
        {str(t): {"w": row} for t, row in enumerate(theta)},
        [FisherStub({"w": row}) for row in fisher],
        Layout.from_tensors({"w": theta[0]}),
        fisher_storage=storage,
        dtype=dtype,
    )
    return bank, fisher, logits


OFFSETS = torch.arange(0, 50_001, 1000)


@pytest.mark.parametrize("models", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merge_with_shares_is_that_of_the_raw_fishers(models: int, dtype: torch.dtype) -> None:
    """Held to the definition in float64, θ as stored.

    A share r_t that is wrong by e_t moves θ* by Σ α_t e_t |θ_t - θ*| / Σ α_t r_t.
    """
    bank, fisher, logits = extreme_bank(models, "shares", dtype)
    merged = timm_ext.fused_merge(bank.theta, bank.fisher, logits, OFFSETS).double()
    theta, wide = bank.theta.double(), fisher.double()
    expected = reference.fused_merge(theta, wide, logits.double(), OFFSETS)

    share = wide / wide.sum(0).clamp(min=1e-300)
    unit, step = torch.finfo(dtype).eps / 2, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    rounding = unit * share + step * (share > 0)
    alpha = torch.sigmoid(logits.double()).repeat_interleave(1000, 0).T
    moved = (alpha * rounding * (theta - expected).abs()).sum(0) / (alpha * share).sum(0).clamp(min=1e-300)
    bound = 1.01 * moved + unit * expected.abs() + 8 * 2.0**-24 * theta.abs().amax(0)
    assert bool(((merged - expected).abs() <= bound).all())
    assert bool((bank.fisher.double().sum(0) <= 1 + models * unit).all())


@pytest.mark.parametrize("models", [2, 3])
def test_where_every_fisher_is_zero_shares_change_no_bit(models: int) -> None:
    raw, fisher, logits = extreme_bank(models, "raw")
    shares, _, _ = extreme_bank(models, "shares")
    logits.requires_grad_()
    results = [timm_ext.fused_merge(b.theta, b.fisher, logits, OFFSETS) for b in (raw, shares)]
    empty = (fisher == 0).all(0)
    assert 0.1 < empty.float().mean() < 0.3
    assert torch.equal(results[0][empty], results[1][empty])
    gradients = [torch.autograd.grad(merged, logits, empty.float())[0] for merged in results]
    assert torch.equal(*gradients)
    assert gradients[0].abs().sum() > 0


def test_fishers_whose_sum_leaves_float64_have_shares() -> None:
    pair = [FisherStub({"a": torch.tensor([1e308, 1e-310], dtype=torch.float64)}) for _ in range(2)]
    layout = Layout.from_tensors({"a": torch.zeros(2)})
    bank = Bank.build({"M1": {"a": M1["a"]}, "M2": {"a": M2["a"]}}, pair, layout, fisher_storage="shares")
    assert bank.fisher.tolist() == [[0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize(
    ("storage", "dtype", "message"),
    [
        ("half", torch.float32, r"fisher_storage: expected None, 'raw' or 'shares' \(got 'half'\)"),
        ("raw", torch.float16, r"fisher_storage: expected 'shares' in float16.*\(got 'raw'\)"),
    ],
)
def test_wrong_storage_is_refused(storage: str, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Bank.build({"M1": M1, "M2": M2}, fishers(), LAYOUT, fisher_storage=storage, dtype=dtype)


def test_all_bad_weights_are_named() -> None:
    bad = {"M1": tensors(a=[NAN, 2.0], b=[3.0]), "M2": tensors(a=[1.0, 2.0], b=[-INF])}
    with pytest.raises(InputError, match=r"bank: expected finite values as float32 \(got 2 tensors") as error:
        Bank.build(bad, None, LAYOUT)
    assert "M1: a: 1 of 2 elements are NaN or infinite" in str(error.value)
    assert "M2: b: 1 of 1 elements are NaN or infinite" in str(error.value)


def test_weights_beyond_the_storage_type_are_refused() -> None:
    with pytest.raises(InputError, match=r"expected finite values as float16 .*\n.*M1: a: 1 of 2"):
        Bank.build({"M1": tensors(a=[1e5, 2.0], b=[3.0])}, None, LAYOUT, dtype=torch.float16)


def test_all_bad_fishers_are_named() -> None:
    pair = fishers(b=[-1.0])
    pair[0].tensors["a"] = torch.tensor([NAN, -3.0])
    with pytest.raises(InputError, match=r"expected finite Fishers that are not negative \(got 3 ") as error:
        Bank.build({"M1": M1, "M2": M2}, pair, LAYOUT)
    assert "Fisher of M1: a: 1 of 2 elements are NaN or infinite" in str(error.value)
    assert "Fisher of M1: a: 1 of 2 elements are negative" in str(error.value)
    assert "Fisher of M2: b: 1 of 1 elements are negative" in str(error.value)


def test_tensors_that_do_not_fit_are_all_named() -> None:
    pair = fishers()
    del pair[1].tensors["b"]
    with pytest.raises(InputError, match="expected tensors that fit the layout") as error:
        Bank.build({"M1": M1, "M2": tensors(a=[1.0])}, pair, LAYOUT)
    assert str(error.value).splitlines()[1:] == [
        "  M2: a: expected [2] (got [1])",
        "  M2: b: expected [1] (got none)",
        "  Fisher of M2: b: expected [1] (got none)",
    ]


def test_fishers_of_different_scalings_need_normalizing() -> None:
    pair = fishers()
    pair[1].scaling = "mean"
    with pytest.raises(InputError, match=r"expected Fishers of one scaling .* \(got sum; mean\)"):
        Bank.build({"M1": M1, "M2": M2}, pair, LAYOUT)
    assert Bank.build({"M1": M1, "M2": M2}, pair, LAYOUT, normalize="model").fisher is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({}, None, LAYOUT), r"expected at least one model \(got none\)"),
        (({"M1": M1}, fishers(), LAYOUT), r"expected one Fisher for each of 1 models \(got 2\)"),
    ],
)
def test_wrong_numbers_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Bank.build(*arguments)


def test_unknown_normalize_is_refused() -> None:
    with pytest.raises(InputError, match=r"normalize: expected None, 'tensor' or 'model' \(got 'sum'\)"):
        Bank.build({"M1": M1}, None, LAYOUT, normalize="sum")


def test_fisher_that_is_zero_everywhere_cannot_be_normalized() -> None:
    pair = [FisherStub(tensors(a=[0.0, 0.0], b=[0.0])), fishers()[0]]
    with pytest.raises(InputError, match=r"expected Fishers above zero somewhere \(got none for M1\)"):
        Bank.build({"M1": M1, "M2": M2}, pair, LAYOUT, normalize="model")


def test_without_fisher_shares_the_weights() -> None:
    bank = Bank.build({"M1": M1, "M2": M2}, fishers(), LAYOUT)
    plain = bank.without_fisher()
    assert plain.fisher is None
    assert plain.theta.data_ptr() == bank.theta.data_ptr()


def test_moving_keeps_the_row_stride() -> None:
    bank = Bank.build({"M1": M1, "M2": M2}, fishers(), LAYOUT)
    moved = bank.to("meta")
    assert moved.theta.is_meta
    assert moved.theta.stride() == bank.theta.stride()
    assert bank.to("cpu").theta.data_ptr() == bank.theta.data_ptr()


@settings(deadline=None)  # the first case imports what checks metadata
@given(
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    storage=st.sampled_from([None, "shares"]),
)
def test_save_and_load(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, dtype: torch.dtype, storage: str | None
) -> None:
    shapes = data.draw(st.lists(st.lists(st.integers(1, 3), max_size=3).map(tuple), min_size=1, max_size=4))
    count = data.draw(st.integers(1, 3))
    models = {f"M{t}": {f"l{i}.w": torch.randn(s) for i, s in enumerate(shapes)} for t in range(count)}
    own = (
        [FisherStub({n: v**2 for n, v in m.items()}) for m in models.values()]
        if data.draw(st.booleans())
        else None
    )
    bank = Bank.build(models, own, Layout.from_tensors(models["M0"]), fisher_storage=storage, dtype=dtype)
    path = tmp_path_factory.mktemp("bank") / "bank.safetensors"
    bank.save(path, parents=["0a"])
    got = Bank.load(path)
    assert torch.equal(got.theta, bank.theta)
    assert got.theta.stride() == bank.theta.stride()
    assert (got.fisher is None) == (own is None)
    assert got.fisher is None or torch.equal(got.fisher, bank.fisher)
    assert (got.layout, got.sources) == (bank.layout, bank.sources)
    assert (got.normalize, got.fisher_storage) == (bank.normalize, bank.fisher_storage)
    assert describe(load_checkpoint(path))["parents"] == ["0a"]


def test_other_files_are_no_bank(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "x", {"w": torch.ones(1)}, kind="network")
    with pytest.raises(InputError, match=r"expected a bank checkpoint \(got network\)"):
        Bank.load(tmp_path / "x")
    save_checkpoint(tmp_path / "y", {"w": torch.ones(1)}, kind="bank")
    with pytest.raises(InputError, match="y: metadata of a bank"):
        Bank.load(tmp_path / "y")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": []}, "expected sources of different names"),
        ({"sources": ["M1", "M1"]}, "expected sources of different names"),
        ({"sources": ["M1", "M2", "M3"]}, r"theta.2: expected \[6\] \(got none\)"),
        ({"normalize": "none"}, "normalize"),
        ({"layout": None}, "layout"),
        ({"shape": [10**6, 10**6]}, r"theta.0: expected \[1000000000000\] \(got \[6\]\)"),
        ({"shape": [-2, -3]}, "expected a shape and its axes for w"),
        ({"out_dim": 7}, "expected a shape and its axes for w"),
    ],
)
def test_other_metadata_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    entry = {"name": "w", "shape": [2, 3], "layer": "", "out_dim": 0, "in_dim": 1, "channel_groups": 1}
    about = {"sources": ["M1", "M2"], "normalize": None, "fisher_storage": None, "layout": [entry]}
    if change.keys() <= about.keys():
        about |= change
    else:
        entry |= change
    rows = {f"theta.{t}": torch.ones(6) for t in range(2)}
    save_checkpoint(tmp_path / "x", rows, kind="bank", bank=about)
    with pytest.raises(InputError, match=message):
        Bank.load(tmp_path / "x")
