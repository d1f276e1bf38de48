"""Weights and Fishers of all source models as two matrices that the merge reads once."""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from timm_ext.checkpoint import load_checkpoint, non_finite, save_checkpoint
from timm_ext.documents import validated
from timm_ext.errors import InputError, lines_of, listed, shown
from timm_ext.layout import Entry, Layout, compatibility_report
from timm_ext.merging.buffers import Buffers
from timm_ext.ops._library import prefer_huge_pages
from timm_ext.storage.state_dicts import names_among

if TYPE_CHECKING:
    from timm_ext.fisher.result import Fisher

Normalization = Literal["tensor", "model"]
FisherStorage = Literal["raw", "shares"]

_ALIGNMENT = 64  # elements between the starts of rows
_VALUES, _FIXED = "buffers.", "fixed buffers."  # in front of names in a file
_PAGE = 4096  # bytes; rows that start a whole number of pages apart compete for the same cache sets


@dataclass(frozen=True, eq=False)
class Bank:
    """θ and F of T source models with P shared elements each.

    The rows are padded to a stride that suits the merge; `theta` and `fisher` are views without the padding.

    Attributes:
        matrices: `[1 or 2, T, stride]`, the weights and, if there are Fishers, those.
        layout: what the P elements are.
        sources: names of the T models.
        normalize: how the Fishers were scaled, see `build`.
        fisher_storage: what stands in for each Fisher, see `build`; None without Fishers.
        buffers: of the source models, as far as they belong to the layout's tensors and were given.
    """

    matrices: Tensor
    layout: Layout
    sources: tuple[str, ...]
    normalize: Normalization | None = None
    fisher_storage: FisherStorage | None = None
    buffers: Buffers = field(default_factory=Buffers)

    @classmethod
    def build(
        cls,
        models: Mapping[str, Mapping[str, Tensor]],
        fishers: "Sequence[Fisher] | None",
        layout: Layout,
        *,
        normalize: Normalization | None = None,
        fisher_storage: FisherStorage | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "Bank":
        """Check and copy the models' tensors; the caller's are neither changed nor kept.

        Parameters in any Fisher's `zero` get F = 1 in all models: the plain mean.

        `normalize="tensor"` divides each tensor's F by its sum, as the authors of T-IMM did; a tensor whose
        sum is 0 in any model gets F = 1 in all. `normalize="model"` divides a model's whole F by its sum.

        `fisher_storage="shares"` stores, in place of F, each element's shares in its sum over the models,

            F[t, p] / Σ_j F[j, p]        (0 where every F is 0)

        which gives the same merge, since a factor common to all models cancels. Shares lie in [0, 1], where
        half precision is safe: bfloat16 rounds them by 2^-8 of their value at most, float16 by 2^-11 of it or
        by 2^-25.

        Args:
            models: the state of each source model, or its parameters alone, by name; tensors that are neither
                the layout's nor buffers that belong to these are ignored. Names may differ from the layout's
                in wrappers of parts, such as `_orig_mod`, here and in the Fishers.
            fishers: of the same models in the same order, or None.
            layout: the shared parameters.
            normalize: None leaves the Fishers as they are; their `scaling` must then agree.
            fisher_storage: `"raw"` or `"shares"`; None is raw, but shares in bfloat16 and float16.
            dtype: of storage: float32, bfloat16 or float16 (float64 for checks).

        Raises:
            InputError: no model, tensors that do not fit the layout, weights that are not finite (in
                `dtype`), Fishers that are negative or not finite, all of them listed with model and tensor;
                raw Fishers in float16, whose range they would leave; buffers that `Buffers.collect` refuses.
        """
        _check_arguments(models, fishers, normalize)
        models, fishers = under_names((*layout.names, *layout.buffers), models, fishers)
        fisher_storage = _choose_storage(fisher_storage, dtype)
        _check_tensors(models, fishers or (), layout)
        buffers = Buffers.collect(models, layout.buffers)
        matrices = empty_matrices(1 if fishers is None else 2, len(models), layout.numel, dtype)
        stored = None if fishers is None else fisher_storage
        bank = cls(matrices, layout, tuple(models), normalize, stored, buffers)
        for row, tensors in zip(bank.theta, models.values(), strict=True):
            layout.flatten(tensors, out=row)
        _check_stored(bank.theta, models, layout)
        if fishers is not None and bank.fisher is not None:
            _fill_fishers(bank, fishers)
            _check_stored(bank.fisher, map(_fisher_of, models), layout)
        return bank

    @property
    def theta(self) -> Tensor:
        """Weights `[T, P]`."""
        return self.matrices[0, :, : self.layout.numel]

    @property
    def fisher(self) -> Tensor | None:
        """Fishers `[T, P]`, or None."""
        return self.matrices[1, :, : self.layout.numel] if len(self.matrices) > 1 else None

    def __len__(self) -> int:
        return len(self.sources)

    def without_fisher(self) -> "Bank":
        """Return the same weights, not copied, with F = 1."""
        return replace(self, matrices=self.matrices[:1], normalize=None, fisher_storage=None)

    def to(self, device: torch.device | str) -> "Bank":
        """Return the bank on a device; it is not copied if it is there."""
        return replace(self, matrices=self.matrices.to(device))

    def save(self, path: Path | str, **metadata: Any) -> str:
        """Write all of it as one safetensors file.

        Args:
            path: of the file.
            **metadata: provenance as JSON values, such as the sources' SHA-256.

        Returns:
            SHA-256 of the file.
        """
        about = {
            "sources": list(self.sources),
            "normalize": self.normalize,
            "fisher_storage": self.fisher_storage,
            "layout": self.layout.to_list(),
        }
        rows = {
            f"{kind}.{index}": row[: self.layout.numel]
            for kind, matrix in zip(("theta", "fisher"), self.matrices, strict=False)
            for index, row in enumerate(matrix)
        }
        buffers = {f"{_VALUES}{name}": value for name, value in self.buffers.values.items()}
        buffers |= {f"{_FIXED}{name}": value for name, value in self.buffers.fixed.items()}
        return save_checkpoint(path, rows | buffers, kind="bank", bank=about, **metadata)

    @classmethod
    def load(cls, path: Path | str) -> "Bank":
        """Read what `save` wrote.

        Raises:
            InputError: the file is not a bank or is damaged.
        """
        checkpoint = load_checkpoint(path, kind="bank")
        about = validated(_About, checkpoint.metadata.get("bank"), f"{path}: metadata of a bank", strict=True)
        layout = Layout(about.layout)
        kinds = ("theta", "fisher") if "fisher.0" in checkpoint.tensors else ("theta",)
        rows = [[f"{kind}.{index}" for index in range(len(about.sources))] for kind in kinds]
        _check_rows([name for names in rows for name in names], checkpoint.tensors, layout.numel, path)
        buffers = Buffers(*(_named(checkpoint.tensors, prefix) for prefix in (_VALUES, _FIXED)))
        if any(value.shape[:1] != (len(about.sources),) for value in buffers.values.values()):
            raise InputError(f"{path}: expected buffers of {len(about.sources)} models (got others)")
        dtype = checkpoint.tensors[rows[0][0]].dtype
        matrices = empty_matrices(len(kinds), len(about.sources), layout.numel, dtype)
        for matrix, names in zip(matrices, rows, strict=True):
            for row, name in zip(matrix, names, strict=True):
                row[: layout.numel] = checkpoint.tensors.pop(name)
        return cls(matrices, layout, about.sources, about.normalize, about.fisher_storage, buffers)


@dataclass(frozen=True)
class _About:
    """The metadata of a file, as `Bank.save` leaves them; see `Bank`."""

    sources: tuple[str, ...]
    normalize: Normalization | None
    fisher_storage: FisherStorage | None
    layout: tuple[Entry, ...]

    def __post_init__(self) -> None:
        if not self.sources or len(set(self.sources)) < len(self.sources):
            raise ValueError(f"expected sources of different names (got {listed(self.sources) or 'none'})")
        if len({entry.name for entry in self.layout}) < len(self.layout):
            raise ValueError("expected a layout of different names (got one twice)")
        for entry in self.layout:
            axes = [axis for axis in (entry.out_dim, entry.in_dim) if axis is not None]
            if min(entry.shape, default=1) < 0 or not all(0 <= axis < len(entry.shape) for axis in axes):
                raise ValueError(f"expected a shape and its axes for {shown(entry.name)} (got {entry.shape})")


def under_names(
    names: Sequence[str],
    models: Mapping[str, Mapping[str, Tensor]],
    fishers: "Sequence[Fisher] | None",
) -> "tuple[dict[str, dict[str, Tensor]], list[Fisher] | None]":
    """Give models and Fishers the names of a network, whichever parts are wrapped in it or in theirs."""
    renamed = {model: _under(names, tensors) for model, tensors in models.items()}
    return renamed, None if fishers is None else [_fisher_under(names, fisher) for fisher in fishers]


def _under(names: Sequence[str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = names_among(tensors, names)
    return {renamed[name]: tensor for name, tensor in tensors.items()}


def _fisher_under(names: Sequence[str], fisher: "Fisher") -> "Fisher":
    renamed = names_among(fisher.tensors, names)
    if all(old == new for old, new in renamed.items()):
        return fisher
    zero, unused = (
        tuple(renamed[name] for name in group if name in renamed) for group in (fisher.zero, fisher.unused)
    )
    return replace(fisher, tensors=_under(names, fisher.tensors), zero=zero, unused=unused)


def _check_rows(names: Sequence[str], tensors: Mapping[str, Tensor], elements: int, path: Path | str) -> None:
    """Refuse rows that are missing, of another length or of several types."""
    lines = [
        f"{name}: expected [{elements}] (got {list(tensors[name].shape) if name in tensors else 'none'})"
        for name in names
        if name not in tensors or tuple(tensors[name].shape) != (elements,)
    ]
    types = {tensors[name].dtype for name in names if name in tensors}
    if lines or len(types) > 1 or not all(dtype.is_floating_point for dtype in types):
        got = f"{len(lines)} that are not" if lines else f"{listed(types)}"
        raise InputError(f"{path}: expected rows of one floating-point type (got {got}){lines_of(lines)}")


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def empty_matrices(matrices: int, models: int, elements: int, dtype: torch.dtype) -> Tensor:
    """Return uninitialised matrices `[matrices, T, stride]` as the merge reads them best.

    The stride is at least P, the padding 0; on the CPU huge pages are asked for, of which the merge touches
    fewer at a time.

    Args:
        matrices: one, or two with Fishers.
        models: T.
        elements: P.
        dtype: of the elements.
    """
    stride = -(-elements // _ALIGNMENT) * _ALIGNMENT
    if stride * dtype.itemsize % _PAGE == 0:
        stride += _ALIGNMENT
    result = torch.empty(matrices, models, stride, dtype=dtype)
    prefer_huge_pages(result)
    result[:, :, elements:] = 0
    return result


def _check_arguments(
    models: Mapping[str, Mapping[str, Tensor]],
    fishers: "Sequence[Fisher] | None",
    normalize: Normalization | None,
) -> None:
    if not models:
        raise InputError("bank: expected at least one model (got none)")
    if normalize is not None and normalize not in get_args(Normalization):
        raise InputError(f"normalize: expected None, 'tensor' or 'model' (got {normalize!r})")
    if fishers is None:
        return
    if len(fishers) != len(models):
        raise InputError(f"bank: expected one Fisher for each of {len(models)} models (got {len(fishers)})")
    scalings = dict.fromkeys(fisher.scaling for fisher in fishers)
    if normalize is None and len(scalings) > 1:
        raise InputError(
            f"bank: expected Fishers of one scaling unless normalize is set (got {'; '.join(scalings)})"
        )


def _choose_storage(wanted: FisherStorage | None, dtype: torch.dtype) -> FisherStorage:
    if wanted is None:
        return "shares" if dtype.itemsize == 2 else "raw"
    if wanted not in get_args(FisherStorage):
        raise InputError(f"fisher_storage: expected None, 'raw' or 'shares' (got {wanted!r})")
    if wanted == "raw" and dtype == torch.float16:
        raise InputError("fisher_storage: expected 'shares' in float16, whose range is too small (got 'raw')")
    return wanted


def _check_tensors(
    models: Mapping[str, Mapping[str, Tensor]], fishers: "Sequence[Fisher]", layout: Layout
) -> None:
    named = {_fisher_of(model): fisher.tensors for model, fisher in zip(models, fishers, strict=False)}
    _refuse("tensors that fit the layout", compatibility_report({**models, **named}, layout=layout))
    lines = [
        f"{model}: {name}: {problem}"
        for model, tensors in named.items()
        for name in layout.names
        for problem in _fisher_problems(tensors[name])
    ]
    _refuse("finite Fishers that are not negative", lines)


def _fisher_of(model: str) -> str:
    return f"Fisher of {model}"


def _fisher_problems(tensor: Tensor) -> list[str]:
    problems = {
        "NaN or infinite": tensor.numel() - int(tensor.isfinite().sum()),
        "negative": int((tensor < 0).sum()),
    }
    return [f"{count} of {tensor.numel()} elements are {what}" for what, count in problems.items() if count]


def _check_stored(matrix: Tensor, rows: Iterable[str], layout: Layout) -> None:
    dtype = str(matrix.dtype).removeprefix("torch.")
    lines = [
        f"{row}: {line}"
        for row, flat in zip(rows, matrix, strict=True)
        for line in non_finite(layout.split(flat))
    ]
    _refuse(f"finite values as {dtype}", lines)


def _refuse(expected: str, lines: Sequence[str]) -> None:
    if lines:
        raise InputError(
            f"bank: expected {expected} (got {len(lines)} tensors that are not){lines_of(lines)}"
        )


def _fill_fishers(bank: Bank, fishers: "Sequence[Fisher]") -> None:
    """Copy the Fishers tensor by tensor, scaled, with F = 1 where the plain mean is due."""
    plain = {name for fisher in fishers for name in fisher.zero}
    totals = _totals(bank, fishers, plain) if bank.normalize == "model" else None
    for entry, start in zip(bank.layout.entries, bank.layout.offsets, strict=True):
        values = _values(entry.name, fishers)
        sums = values.sum(dim=1) if bank.normalize == "tensor" else totals
        if entry.name in plain or (sums is not None and (sums == 0).any()):
            values.fill_(1)
        elif sums is not None:
            values /= sums[:, None]
        stored = _shares(values) if bank.fisher_storage == "shares" else values
        bank.matrices[1, :, start : start + entry.numel] = stored


def _shares(values: Tensor) -> Tensor:
    """Return each model's part of an element's sum over the models; 0 where all are 0."""
    largest = values.amax(dim=0)
    relative = values / largest.where(largest > 0, 1)  # their sum is 0 or in [1, T]
    return relative / relative.sum(dim=0).clamp(min=1)


def _values(name: str, fishers: "Sequence[Fisher]") -> Tensor:
    """Return one tensor's Fisher of all models, `[T, elements]` in float64."""
    return torch.stack([fisher.tensors[name].reshape(-1).to("cpu", torch.float64) for fisher in fishers])


def _totals(bank: Bank, fishers: "Sequence[Fisher]", plain: Set[str]) -> Tensor:
    totals = torch.zeros(len(bank), dtype=torch.float64)
    for name in bank.layout.names:
        if name not in plain:
            totals += _values(name, fishers).sum(dim=1)
    if empty := [source for source, total in zip(bank.sources, totals, strict=True) if total == 0]:
        raise InputError(f"bank: expected Fishers above zero somewhere (got none for {listed(empty)})")
    return totals
