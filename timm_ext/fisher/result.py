"""The diagonal Fisher of a network, with what is needed to compare and trust it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timm_ext.checkpoint import load_checkpoint, save_checkpoint
from timm_ext.documents import validated
from timm_ext.errors import InputError, lines_of, listed, shown


class FisherKind(str, Enum):
    """Likelihood and labels of a Fisher; with labels that are `true` it is the empirical Fisher."""

    BERNOULLI_SAMPLED = "bernoulli-sampled"
    BERNOULLI_TRUE = "bernoulli-true"
    CATEGORICAL_SAMPLED = "categorical-sampled"
    CATEGORICAL_TRUE = "categorical-true"
    DICE_SAMPLED = "dice-sampled"
    DICE_TRUE = "dice-true"
    CUSTOM_SAMPLED = "custom-sampled"
    CUSTOM_TRUE = "custom-true"

    @classmethod
    def of(cls, likelihood: str, labels: str) -> "FisherKind":
        """Return the kind of a likelihood's name and `sampled` or `true`; other likelihoods are custom."""
        known = {kind.value for kind in cls}
        value = f"{likelihood}-{labels}"
        return cls(value if value in known else f"custom-{labels}")


@dataclass(frozen=True)
class Fisher:
    """F = 1/N Σ_n 1/S Σ_s (∂ log p(y_ns | x_n) / ∂θ)² of each element, over N examples, S labels each.

    Attributes:
        tensors: by parameter name, of the parameter's shape, non-negative, float32 or float64.
        count: number of examples N.
        kind: likelihood and labels.
        scaling: what the log-likelihood of one example adds up.
        zero: parameters whose Fisher is zero by structure: biases in front of an instance norm.
        unused: parameters that took no part in any output, whose Fisher is zero for that reason.
        samples: labels drawn for each example S, 1 for true labels.
        seed: of the sampled labels, None for true ones.
        metadata: provenance, such as the network's SHA-256 and the task; JSON values.
    """

    tensors: dict[str, Tensor]
    count: int
    kind: FisherKind
    scaling: str
    zero: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    samples: int = 1
    seed: int | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def save(
        self,
        path: Path | str,
        *,
        network_sha256: str | None = None,
        task: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> str:
        """Write the Fisher as safetensors with its provenance.

        Args:
            path: of the file.
            network_sha256: of the network's checkpoint.
            task: the task its examples came from, as JSON values.
            settings: of the estimate, as JSON values.

        Returns:
            SHA-256 of the file.

        Raises:
            InputError: values are NaN, infinite or negative, or the file cannot be written.
        """
        _check_values(self.tensors, str(path))
        given = {"network_sha256": network_sha256, "task": task, "settings": settings}
        provenance = self.metadata | {key: value for key, value in given.items() if value is not None}
        return save_checkpoint(
            path,
            self.tensors,
            kind="fisher",
            fisher={
                "kind": self.kind.value,
                "count": self.count,
                "scaling": self.scaling,
                "zero": list(self.zero),
                "unused": list(self.unused),
                "samples": self.samples,
                "seed": self.seed,
            },
            provenance=provenance,
        )

    @classmethod
    def load(cls, path: Path | str) -> "Fisher":
        """Read what `save` wrote.

        Raises:
            InputError: the file is not a Fisher, or holds NaN, infinite or negative values; all such tensors
                are named.
        """
        checkpoint = load_checkpoint(path, kind="fisher")
        about = validated(_About, checkpoint.metadata.get("fisher"), f"{path}: metadata", strict=True)
        provenance = checkpoint.metadata.get("provenance") or {}
        if not isinstance(provenance, dict):
            raise InputError(f"{path}: expected a mapping as provenance (got {shown(repr(provenance))})")
        _check_values(checkpoint.tensors, str(path))
        for what, names in (("zero", about.zero), ("unused", about.unused)):
            if unknown := [name for name in names if name not in checkpoint.tensors]:
                raise InputError(
                    f"{path}: expected tensors for all of {what} (got none for {listed(unknown)})"
                )
        return cls(checkpoint.tensors, **vars(about), metadata=provenance)


@dataclass(frozen=True)
class _About:
    """The metadata of a file, as `Fisher.save` leaves them; see `Fisher`."""

    kind: FisherKind
    count: int
    scaling: str
    zero: tuple[str, ...]
    samples: int
    seed: int | None
    unused: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.count < 1 or self.samples < 1:
            raise InputError(f"expected counts of at least 1 (got {self.count} and {self.samples})")


def unused_note(names: Sequence[str]) -> str:
    """Say which parameters have F = 0 since no output depends on them."""
    return f"Fisher: {len(names)} parameters take no part in the output and have F = 0: {listed(names)}"


def _check_values(tensors: Mapping[str, Tensor], what: str) -> None:
    if not tensors:
        raise InputError(f"{what}: expected a Fisher of some tensors (got none)")
    bad = [f"{name}: {problem}" for name, tensor in tensors.items() if (problem := _problem(tensor))]
    if bad:
        raise InputError(
            f"{what}: expected a finite, non-negative Fisher (got {len(bad)} tensors that are not)"
            f"{lines_of(bad)}"
        )


def _problem(tensor: Tensor) -> str:
    if tensor.dtype not in _TYPES:
        return f"of type {tensor.dtype}"
    if not bool(tensor.isfinite().all()):
        return "NaN or infinite"
    return "negative" if bool((tensor < 0).any()) else ""


_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
