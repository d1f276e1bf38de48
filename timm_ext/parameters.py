"""Which tensors of a network are merged, and which buffers follow them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise

from torch import Tensor, nn

from timm_ext._moved import names_before
from timm_ext.errors import InputError, listed

_NORMS = (
    nn.modules.batchnorm._NormBase,  # batch and instance norms of every dimension
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return each parameter once, under the first name it was registered with.

    A `state_dict` names a tied or doubly registered tensor several times; a merge or a Fisher over it would
    count it as often. Two parameters are one when they cover the same memory, also as different views.

    Raises:
        InputError: a lazy parameter has no shape yet, or two parameters overlap in part.
    """
    aliases = parameter_aliases(model)
    every = dict(model.named_parameters(remove_duplicate=False))
    return {name: every[name] for name, first in aliases.items() if name == first}


def parameter_aliases(model: nn.Module) -> dict[str, str]:
    """Map every name a parameter is registered under to its first name, in registration order.

    Raises:
        InputError: a lazy parameter has no shape yet, or two parameters overlap in part.
    """
    first_of_object: dict[int, str] = {}
    first_of_span: dict[tuple[object, int, int], str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise InputError(
                f"{name}: expected a parameter with a shape (got a lazy one: run one forward first)"
            )
        first = first_of_object.setdefault(id(parameter), name)
        if first == name and (span := _memory_span(parameter)) is not None:
            first = first_of_span.setdefault(span, name)
        aliases[name] = first
    _refuse_overlaps(first_of_span)
    return aliases


def slots_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers in each module that holds them, modules under their first name.

    `functional_call` must be given these names alone, without its own search for ties: it fills a slot once
    for each name of a module that lies at several places, and would leave the first filling there.
    """
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{path}.{name}" if path else name, tensor


def _memory_span(tensor: Tensor) -> tuple[object, int, int] | None:
    """Return (device, first byte, one past the last byte), or None for a tensor without memory."""
    if tensor.numel() == 0 or tensor.is_meta:
        return None
    extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return tensor.device, begin, begin + extent * tensor.element_size()


def _refuse_overlaps(names: Mapping[tuple[object, int, int], str]) -> None:
    spans = sorted(names, key=lambda span: (str(span[0]), span[1], span[2]))
    for left, right in pairwise(spans):
        if left[0] == right[0] and right[1] < left[2]:
            raise InputError(
                f"{names[right]}: expected memory of its own (got memory that overlaps {names[left]} in part)"
            )


@dataclass(frozen=True)
class Split:
    """Names of the parameters that are merged and of those that belong to one task.

    Attributes:
        shared: merged among the source models (the paper's P).
        specific: initialised anew for the target task (the paper's S).
        transfer_norms: whether norms are merged, which norms without parameters follow, too; None where it is
            to be seen from the shared names, as `buffer_owners` says.
    """

    shared: tuple[str, ...]
    specific: tuple[str, ...]
    transfer_norms: bool | None = None


def split_parameters(model: nn.Module, *, heads: Sequence[str], transfer_norms: bool = False) -> Split:
    """Tell shared from task-specific parameters: heads and, unless transferred, norms are task-specific.

    As in T-IMM (Geyer et al., MIDL 2019), where the output layers and all instance norms belong to a task.

    Args:
        model: the network.
        heads: shell patterns on parameter names, each of which must match something; one that ends in a dot,
            such as `"head*."`, stands for all parameters below.
        transfer_norms: merge the affine parameters of instance, group, layer and batch norms, too, and the
            running statistics of norms without any.

    Raises:
        InputError: a pattern matches nothing, or no parameter is left to share.
    """
    aliases = parameter_aliases(model)
    unmatched = [pattern for pattern in heads if not any(matches(name, [pattern]) for name in aliases)]
    if unmatched:
        raise InputError(
            f"heads: expected patterns that match parameters (got {listed(map(repr, unmatched))}, "
            f"which match none of {listed(aliases)})"
        )
    specific = {first for name, first in aliases.items() if matches(name, heads)}
    if not transfer_norms:
        specific |= {aliases[name] for name in _norm_parameters(model)}
    names = [name for name, first in aliases.items() if name == first]
    if len(specific) == len(names):
        raise InputError(
            f"heads: expected at least one shared parameter to remain (got all of {listed(names)})"
        )
    return Split(
        shared=tuple(name for name in names if name not in specific),
        specific=tuple(name for name in names if name in specific),
        transfer_norms=transfer_norms,
    )


def buffer_owners(
    model: nn.Module, shared: Sequence[str], *, transfer_norms: bool | None = None
) -> dict[str, tuple[str, ...]]:
    """Return the buffers that follow shared parameters, each with the names of those parameters.

    A buffer belongs to the parameters of its module or, if that has none, of the nearest module around it
    that has some: the running mean of a norm to the norm's weight and bias. Where these are all
    task-specific, it is, too. Buffers that are no part of the state are left out.

    A norm without parameters is treated as one with them: its running statistics are task-specific unless
    norms are transferred. Then they belong to the layer that feeds the norm, for which the module with
    parameters of its own that is registered right before the norm is taken (where there is none, the one
    right after it); they are task-specific where that layer is, or the module around the norm.

    Args:
        model: the network.
        shared: names of its shared parameters, each its parameter's first.
        transfer_norms: whether norms without parameters are merged; None: where `shared` names a parameter
            of another norm.
    """
    aliases = parameter_aliases(model)
    wanted = set(shared)
    if transfer_norms is None:
        transfer_norms = any(aliases[name] in wanted for name in _norm_parameters(model))
    feeders = _feeders_of_plain_norms(model)
    owners = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if name in aliases or not isinstance(value, Tensor):
            continue
        module = path = name.rpartition(".")[0]
        while path and not any(True for _ in model.get_submodule(path).parameters()):
            path = path.rpartition(".")[0]
        inside = {first for other, first in aliases.items() if not path or other.startswith(f"{path}.")}
        if module in feeders and inside & wanted:
            layer = [other for other in aliases if other.rpartition(".")[0] == feeders[module]]
            inside = {aliases[other] for other in layer} if transfer_norms else set()
        if inside & wanted:
            owners[name] = tuple(first for first in shared if first in inside)
    return owners


def _feeders_of_plain_norms(model: nn.Module) -> dict[str, str]:
    """Return each module that has running statistics but no parameters, with the layer that feeds it."""
    feeders: dict[str, str] = {}
    before: str | None = None
    waiting: list[str] = []
    for path, module in model.named_modules(remove_duplicate=False):
        if any(True for _ in module.parameters(recurse=False)):
            before = path
            feeders |= dict.fromkeys(waiting, path)
            waiting = []
        elif "running_mean" in dict(module.named_buffers(recurse=False)):
            if before is None:
                waiting.append(path)
            else:
                feeders[path] = before
    return feeders


def _norm_parameters(model: nn.Module) -> Iterator[str]:
    for path, module in model.named_modules(remove_duplicate=False):
        if is_norm(module):
            for name, _ in module.named_parameters(recurse=False):
                yield f"{path}.{name}" if path else name


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module is a norm: one of PyTorch's, or of a class called so with 1-D parameters."""
    if isinstance(module, _NORMS):
        return True
    own = list(module.parameters(recurse=False))
    return "norm" in type(module).__name__.lower() and bool(own) and all(p.ndim <= 1 for p in own)


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Tell whether a shell pattern fits a name; one that ends in a dot stands for all names below."""
    return any(fnmatchcase(name, p + "*" if p.endswith(".") else p) for p in patterns)


__getattr__ = names_before(__name__)
