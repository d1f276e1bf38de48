"""What becomes of every tensor of a target network at its start: merged, mapped, aligned, or its own."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch import nn

from timm_ext.data.tasks import Task
from timm_ext.merging import Bank
from timm_ext.merging.modalities import source_channels
from timm_ext.networks.registry import heads_of, input_layers_of
from timm_ext.parameters import Split, matches, named_parameters
from timm_ext.transfer.sources import Sources

Use = Literal["merged", "head", "norm", "own"]


@dataclass(frozen=True)
class TensorUse:
    """What becomes of a parameter or buffer, each once, under its first name.

    Attributes:
        name: of the tensor.
        shape: of it.
        use: `merged` of the sources; the target's own as a `head` or `norm`, which start anew, or `own`: a
            buffer of these, or of nothing.
        mapped: of a layer that reads the images, for each source whose channels do not lie as the target's
            do, and each modality of the target, the modality of the source whose channel it takes; None
            where the target keeps its own weights.
        moved: of each source, how many channels were given another place by alignment, by axis.
    """

    name: str
    shape: tuple[int, ...]
    use: Use
    mapped: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)
    moved: Mapping[str, Mapping[int, int]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values; what does not apply is left out."""
        return {key: value for key, value in asdict(self).items() if value != {}}


def uses_of(
    target: nn.Module,
    task: Task,
    split: Split,
    sources: Sources | None,
    bank: Bank | None,
    unseen: Mapping[str, str] | None = None,
) -> tuple[TensorUse, ...]:
    """Say what a start makes of each tensor, from what it is made of.

    Args:
        target: the network before it is initialised.
        task: the target's.
        split: of its parameters, by which the bank was made.
        sources: as they are merged, aligned or not.
        bank: of them; None where nothing is merged.
        unseen: see `match_input_channels`.
    """
    merged = set() if bank is None else {*bank.layout.names, *bank.layout.buffers}
    heads, specific = heads_of(target), set(split.specific)
    parameters = named_parameters(target)
    aliases = {name for name, _ in target.named_parameters(remove_duplicate=False)}
    buffers = {name: value for name, value in target.state_dict().items() if name not in aliases}
    readers = set(input_layers_of(target)) & merged if merged else set()
    mapped = {} if sources is None or not readers else _mapped(sources, task, unseen)
    uses = []
    for name, tensor in {**parameters, **buffers}.items():
        use: Use = "merged" if name in merged else "own"
        if name in specific:
            use = "head" if matches(name, heads) else "norm"
        moved = {} if sources is None or name not in merged else _moved(sources, name)
        uses.append(TensorUse(name, tuple(tensor.shape), use, mapped if name in readers else {}, moved))
    return tuple(uses)


def summary(uses: Sequence[TensorUse]) -> str:
    """Say in one line how many tensors are merged, start anew, are mapped by modality and aligned."""
    counts = Counter(use.use for use in uses)
    told = [f"{counts['merged']} of {len(uses)} tensors are merged"]
    anew = [f"{counts[kind]} of {kind}s" for kind in ("head", "norm") if counts[kind]]
    told += [f"{' and '.join(anew)} start anew"] if anew else []
    if mapped := [use.name for use in uses if use.mapped]:
        told.append(f"input channels of {', '.join(mapped)} are mapped by name")
    if aligned := sum(1 for use in uses if use.moved):
        told.append(f"channels of {aligned} are aligned")
    return "; ".join(told)


def _mapped(
    sources: Sources, task: Task, unseen: Mapping[str, str] | None
) -> dict[str, dict[str, str | None]]:
    """Return, for each source whose channels do not stay, which modality each of the target's takes."""
    result = {}
    for name, source in zip(sources.names, sources.tasks, strict=True):
        places = source_channels(source.modalities, task.modalities, unseen)
        if places == tuple(range(len(source.modalities))):
            continue
        taken = (None if place is None else source.modalities[place] for place in places)
        result[name] = dict(zip(task.modalities, taken, strict=True))
    return result


def _moved(sources: Sources, tensor: str) -> dict[str, Mapping[int, int]]:
    pairs = zip(sources.names, sources.moved, strict=False)
    return {name: moved[tensor] for name, moved in pairs if tensor in moved}
