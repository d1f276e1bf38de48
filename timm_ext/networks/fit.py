"""Whether the tensors of a file are those of a network, and if not, what the likely cause is."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from timm_ext.errors import InputError, lines_of, shown
from timm_ext.layout import compatibility_report


def check_tensors(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    network: str,
    path: Path,
    notes: Sequence[str],
) -> None:
    """Refuse tensors that are not those of a network.

    Args:
        found: in the file.
        expected: of the network, also without memory.
        network: what the message calls it.
        path: of the file.
        notes: how the tensors were found in the file, see `timm_ext.checkpoint.Checkpoint`.

    Raises:
        InputError: with the likely cause, and some of the tensors that differ.
    """
    lines = compatibility_report({network: expected, str(path): found})
    if lines:
        how = f" ({'; '.join(notes)})" if notes else ""
        raise InputError(
            f"{path}: expected the tensors of {network} (got {len(lines)} that differ: "
            f"{_cause(found, expected)}){how}{lines_of(lines)}"
        )


def _cause(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    common = found.keys() & expected.keys()
    missing, unknown = len(expected.keys() - common), len(found.keys() - common)
    if not common:
        first, wanted = next(iter(found), "none"), next(iter(expected), "none")
        return f"no name in common, such as {shown(first)} in place of {wanted}; a prefix, or another network"
    if missing and unknown:
        return f"{missing} are missing, {unknown} unknown; another network, or other options"
    if missing:
        return f"{missing} are missing; only a part of the network, or one of fewer layers"
    if unknown:
        return f"{unknown} are unknown; a larger network, or counters of a tool among its tensors"
    if any(found[name].shape != expected[name].shape for name in common):
        return "other shapes; other numbers of channels, regions or filters"
    differing = [found[name].dtype for name in common if found[name].dtype != expected[name].dtype]
    types = sorted({str(dtype).removeprefix("torch.") for dtype in differing})
    return f"stored as {', '.join(types)}; convert them first, for example with tensor.float()"
