"""What an update is given, checked before anything is computed."""

from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from timm_ext.errors import InputError, listed, shown
from timm_ext.fisher.likelihoods import Likelihood, can_sample
from timm_ext.fisher.unwrap import plain


def check_labels(likelihood: Likelihood, labels: str, samples: int, seed: int) -> None:
    """Refuse kinds and numbers of labels that do not go together, and a seed that is no number.

    Raises:
        InputError: naming the option.
    """
    if labels not in ("sampled", "true"):
        raise InputError(f"labels: expected 'sampled' or 'true' (got {labels!r})")
    if labels == "sampled" and not can_sample(likelihood):
        raise InputError(
            "likelihood: expected one that can sample labels (got a function; use labels='true' or subclass "
            "timm_ext.fisher.Likelihood)"
        )
    if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
        raise InputError(f"samples: expected at least 1 (got {samples!r})")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise InputError(f"seed: expected a whole number (got {seed!r})")
    if labels == "true" and samples != 1:
        raise InputError(f"samples: expected 1 for true labels (got {samples})")


def checked_batch(x: Any, ids: Any, seen: Container[str] = ()) -> tuple[Tensor, list[str]]:
    """Return a batch as a plain tensor and the names of its examples.

    Args:
        x: `[B, ...]`.
        ids: name of each example; one text for one example.
        seen: names that must not come again.

    Raises:
        InputError: no tensor, no example, other than one name for each, or a name twice.
    """
    if not isinstance(x, Tensor) or not x.dim() or not len(x):
        got = f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        hint = "; torch.from_numpy makes one" if type(x).__module__ == "numpy" else ""
        raise InputError(f"x: expected a tensor [B, ...] with B >= 1 (got {got}{hint})")
    if x.is_complex() or x.layout != torch.strided or x.is_nested or x.is_quantized or x.is_meta:
        raise InputError(
            f"x: expected a dense tensor of real numbers (got {x.dtype}, {x.layout}, on {x.device})"
        )
    names = _names(ids, len(x))
    fresh: set[str] = set()
    for id in names:
        if id in seen or id in fresh:
            raise InputError(
                f"example {id}: expected once (got it again; each example counts once in the mean)"
            )
        fresh.add(id)
    # What was made in inference mode cannot be saved for a backward.
    return plain(x.clone() if x.is_inference() else x.detach()), names


def _names(ids: Any, count: int) -> list[str]:
    names = [ids] if isinstance(ids, str) else list(ids) if isinstance(ids, Iterable) else None
    if names is None or len(names) != count or not all(isinstance(id, str) for id in names):
        got = type(ids).__name__ if names is None else f"{len(names)}: {listed(map(repr, names))}"
        raise InputError(f"ids: expected {count} strings, one for each example (got {got})")
    return names


def applied(model: nn.Module, x: Tensor) -> Any:
    """Call a model.

    Raises:
        InputError: it does not take such images.
    """
    try:
        return model(x)
    except (InputError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise InputError(
            f"model: expected images that it takes (got {list(x.shape)}, {x.dtype}, on {x.device}; "
            f"{type(error).__name__}: {shown(error)})"
        ) from error


def check_surroundings() -> None:
    """Refuse a mode of PyTorch that leaves no graph.

    Raises:
        InputError: in `torch.inference_mode`.
    """
    if torch.is_inference_mode_enabled():
        raise InputError("update: expected a call outside torch.inference_mode (got one inside)")
