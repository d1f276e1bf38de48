"""Log-likelihoods of a batch of examples, their gradients, and labels sampled from the network itself."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from timm_ext.errors import InputError, listed
from timm_ext.fisher.unwrap import plain
from timm_ext.ops.fisher import Sampled, sample_labels

LogLikelihood = Callable[[Tensor, Any], Tensor]


class Likelihood(ABC):
    """How probable a target is given the logits of one example.

    Attributes:
        name: first half of the Fisher's kind.
        scaling: what the log-likelihood of one example sums or averages, stored with the Fisher.
    """

    name: str = "custom"
    scaling: str = "custom"

    @abstractmethod
    def log_likelihood(self, logits: Tensor, target: Any) -> Tensor:
        """Return log p(target | logits) of each example, `[B]`, without mixing examples.

        Args:
            logits: `[B, ...]`, at least float32.
            target: what `sample` returns, or the true labels of the batch.
        """

    def sample(self, logits: Tensor, keys: Tensor) -> Any:
        """Draw a target of each example from the network's own prediction.

        Args:
            logits: `[B, ...]`.
            keys: int64 `[B]`, on the device of the logits, of seed, example and sample; nothing else may
                decide the draw. `timm_ext.ops.reference.uniform` makes random numbers of them.

        Raises:
            InputError: this likelihood cannot be sampled.
        """
        raise InputError(
            f"likelihood: expected one with a sample method for sampled labels (got {type(self).__name__}; "
            "use labels='true' or subclass timm_ext.fisher.Likelihood)"
        )

    def sampled_score(self, logits: Tensor, keys: Tensor, ids: Sequence[str]) -> Tensor:
        """Return `score` at a drawn target."""
        return self.score(logits, self.sample(logits, keys), ids)

    def check(self, logits: Tensor, target: Any, ids: Sequence[str]) -> None:
        """Refuse true labels that do not fit the logits.

        Raises:
            InputError: naming the example where there is one.
        """
        del logits, target, ids

    def score(self, logits: Tensor, target: Any, ids: Sequence[str]) -> Tensor:
        """Return the gradient of each example's log-likelihood with respect to its logits, `[B, ...]`.

        Raises:
            InputError: the log-likelihood is not `[B]`, not differentiable or not finite.
        """
        variable = logits.detach().requires_grad_()
        with torch.enable_grad():
            value = self.log_likelihood(variable, target)
        if not isinstance(value, Tensor) or value.shape != (len(ids),):
            raise InputError(
                f"likelihood: expected one value for each example, [{len(ids)}] (got {_describe(value)})"
            )
        if not value.requires_grad:
            raise InputError("likelihood: expected a differentiable function of the logits (got a constant)")
        require_finite(value, ids, "log-likelihood")
        (score,) = torch.autograd.grad(value.sum(), variable)
        require_finite(score, ids, "gradient of the log-likelihood")
        return score


class _Drawn(Likelihood):
    """A likelihood whose labels one operator draws, together with their score."""

    draws: Sampled

    def sample(self, logits: Tensor, keys: Tensor) -> Tensor:
        """Draw a label of each voxel with its predicted probability."""
        return sample_labels(logits, keys, self.draws)[0]

    def sampled_score(self, logits: Tensor, keys: Tensor, ids: Sequence[str]) -> Tensor:
        """Return the score at drawn labels, which nobody needs to see."""
        del ids
        return sample_labels(logits, keys, self.draws, labels=False)[1]


class Bernoulli(_Drawn):
    """Independent binary regions: Σ over regions and voxels of y·log σ(z) + (1−y)·log(1−σ(z)).

    Logits and targets are `[B, R, D, H, W]`, targets 0 or 1.
    """

    name = "bernoulli"
    draws = "bernoulli"
    scaling = "sum over voxels and regions"

    def log_likelihood(self, logits: Tensor, target: Any) -> Tensor:
        """Return the sum over regions and voxels, `[B]`."""
        loss = functional.binary_cross_entropy_with_logits(logits, target.to(logits), reduction="none")
        return -loss.flatten(1).sum(1)

    def check(self, logits: Tensor, target: Any, ids: Sequence[str]) -> None:
        """Refuse targets of another shape or with values other than 0 and 1."""
        _require_tensor(target, logits.shape, "y")
        _require_labels((target == 0) | (target == 1), target, ids, "0 or 1")

    def score(self, logits: Tensor, target: Any, ids: Sequence[str]) -> Tensor:
        """Return y − σ(z)."""
        del ids
        score: Tensor = target.to(logits) - logits.detach().sigmoid()
        return score


class Categorical(_Drawn):
    """One class for each voxel: Σ over voxels of log softmax(z)[y].

    Logits are `[B, K, ...]`, targets `[B, ...]` int64 with classes 0 … K−1, or `[B, K, ...]` with one map of
    0 and 1 for each class.
    """

    name = "categorical"
    draws = "categorical"
    scaling = "sum over voxels"

    def log_likelihood(self, logits: Tensor, target: Any) -> Tensor:
        """Return the sum over voxels, `[B]`."""
        classes = _classes(logits, target)
        return -functional.cross_entropy(logits, classes, reduction="none").reshape(len(logits), -1).sum(1)

    def check(self, logits: Tensor, target: Any, ids: Sequence[str]) -> None:
        """Refuse targets of another shape or type, and classes outside 0 … K−1."""
        if isinstance(target, Tensor) and target.shape == logits.shape:
            _require_labels((target == 0) | (target == 1), target, ids, "0 or 1")
            _require_labels((target.sum(1) == 1), target.sum(1), ids, "of exactly one class in each voxel")
            return
        _require_tensor(target, (logits.shape[0], *logits.shape[2:]), "y")
        if target.dtype != torch.int64:
            raise InputError(f"y: expected int64 classes (got {target.dtype})")
        classes = logits.shape[1]
        _require_labels((target >= 0) & (target < classes), target, ids, f"0 to {classes - 1}")

    def score(self, logits: Tensor, target: Any, ids: Sequence[str]) -> Tensor:
        """Return onehot(y) − softmax(z)."""
        del ids
        score = logits.detach().softmax(1).neg_()
        index = _classes(logits, target).unsqueeze(1)
        return score.scatter_add_(1, index, torch.ones_like(index, dtype=score.dtype))


def _classes(logits: Tensor, target: Tensor) -> Tensor:
    """Return the number of each voxel's class."""
    return target.argmax(1) if target.shape == logits.shape else target


class Dice(Bernoulli):
    """Log of the soft Dice of each example, averaged over regions, as in T-IMM (Geyer et al., MIDL 2019).

    log( 1/R · Σ_r (2·Σ p·y + s) / (Σ p + Σ y + s) ) with p = σ(z), sums over voxels and s = 1e-5. Not the
    logarithm of a probability, but what the authors' code squares the gradient of;
    `Bank.build(normalize="tensor")` is the second half of their recipe.
    """

    name = "dice"
    scaling = "log of the mean soft Dice over regions"
    smooth = 1e-5

    score = Likelihood.score  # by automatic differentiation
    sampled_score = Likelihood.sampled_score

    def log_likelihood(self, logits: Tensor, target: Any) -> Tensor:
        """Return the log of the mean Dice over regions, `[B]`.

        Raises:
            InputError: the logits have no region axis.
        """
        if logits.dim() < 3:
            raise InputError(f"likelihood dice: expected logits [B, R, ...] (got {list(logits.shape)})")
        p, y = logits.sigmoid().flatten(2), target.to(logits).flatten(2)
        dice: Tensor = (2 * (p * y).sum(2) + self.smooth) / (p.sum(2) + y.sum(2) + self.smooth)
        return dice.mean(1).log()


class Custom(Likelihood):
    """A caller's own function of logits `[B, ...]` and target, returning log-likelihoods `[B]`."""

    def __init__(self, function: LogLikelihood):
        self._function = function

    def log_likelihood(self, logits: Tensor, target: Any) -> Tensor:
        """Call the function."""
        return self._function(logits, target)


_LIKELIHOODS: dict[str, type[Likelihood]] = {kind.name: kind for kind in (Bernoulli, Categorical, Dice)}


def get_likelihood(likelihood: str | Likelihood | LogLikelihood) -> Likelihood:
    """Return the likelihood of a name, an instance or a callable.

    Raises:
        InputError: the name is not known.
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    if isinstance(likelihood, str) and likelihood in _LIKELIHOODS:
        return _LIKELIHOODS[likelihood]()
    if callable(likelihood):
        return Custom(likelihood)
    raise InputError(f"likelihood: expected {', '.join(_LIKELIHOODS)} or a callable (got {likelihood!r})")


def can_sample(likelihood: Likelihood) -> bool:
    """Tell whether a likelihood draws labels."""
    return type(likelihood).sample is not Likelihood.sample


def example_keys(ids: Sequence[str], *, seed: int, sample: int) -> Tensor:
    """Return a 64-bit key of seed, example and sample index for each example, int64 `[B]` on the CPU."""
    digests = [hashlib.sha256(f"{seed}\0{sample}\0{id}".encode()).digest() for id in ids]
    return torch.tensor([int.from_bytes(digest[:8], "little", signed=True) for digest in digests])


def summed_logits(output: Any) -> Tensor:
    """Return the logit map of a network's output; deep-supervision outputs are added.

    Maps of lower resolution are repeated (nearest neighbour) onto the grid of the largest.

    Args:
        output: `[B, K, ...]`, or a list, tuple or mapping of such.

    Raises:
        InputError: there is no floating-point tensor, or the maps do not fit onto one grid.
    """
    maps = list(output.values()) if isinstance(output, Mapping) else output
    maps = [maps] if isinstance(maps, Tensor) else maps
    if not isinstance(maps, (list, tuple)) or not maps or not all(_is_map(m) for m in maps):
        raise InputError(f"network output: expected logits or a list of them (got {_describe(output)})")
    if len(maps) == 1:
        return plain(maps[0])
    largest = max(maps, key=lambda m: m[0].numel())
    return torch.stack([_onto(plain(m), largest.shape) for m in maps]).sum(0)


def _onto(logits: Tensor, shape: Sequence[int]) -> Tensor:
    if logits.shape == tuple(shape):
        return logits
    fits = logits.dim() == len(shape) and logits.shape[:2] == tuple(shape[:2])
    if not fits or any(n % m for n, m in zip(shape[2:], logits.shape[2:], strict=True)):
        raise InputError(
            "network output: expected deep-supervision maps of one channel count, whose sizes divide "
            f"those of the largest, {list(shape)} (got {list(logits.shape)})"
        )
    for axis in range(2, len(shape)):
        logits = logits.repeat_interleave(shape[axis] // logits.shape[axis], axis)
    return logits


def _is_map(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 1


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} of {', '.join(type(v).__name__ for v in value) or 'nothing'}"
    return type(value).__name__


def require_finite(tensor: Tensor, ids: Sequence[str], what: str) -> None:
    """Refuse NaN and infinity in a tensor `[B, ...]`, naming the examples.

    Raises:
        InputError: with every id whose part is not finite.
    """
    if bool(tensor.sum().isfinite()):  # one pass; NaN and infinity stay in a sum, which may also overflow
        return
    finite = tensor.isfinite().reshape(len(ids), -1).all(1)
    if not bool(finite.all()):
        bad = [id for id, ok in zip(ids, finite.tolist(), strict=True) if not ok]
        raise InputError(f"{what}: expected finite values (got NaN or infinity in example {listed(bad)})")


def _require_tensor(target: Any, shape: Sequence[int], what: str) -> None:
    got = list(target.shape) if isinstance(target, Tensor) else type(target).__name__
    if got != list(shape):
        raise InputError(f"{what}: expected shape {list(shape)} (got {got})")


def _require_labels(valid: Tensor, target: Tensor, ids: Sequence[str], expected: str) -> None:
    if bool(valid.all()):
        return
    example = int((~valid).reshape(len(ids), -1).any(1).nonzero()[0])
    value = target[example][~valid[example]].flatten()[0].item()
    raise InputError(f"y: expected labels {expected} (got {value:g} in example {ids[example]})")
