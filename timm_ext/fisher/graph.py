"""Which parameters the log-likelihood depends on, and how, read from the autograd graph of a forward."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from timm_ext.errors import InputError
from timm_ext.fisher.tape import Call

_REENTRANT = "CheckpointFunctionBackward"  # of PyTorch, fairscale and DeepSpeed


@dataclass(frozen=True)
class Graph:
    """The parameters between the input and the logits.

    Attributes:
        uses: number of recorded uses by parameter name; the backward visits each of them once.
        rules: by parameter name, the rules its uses were recorded by.
        direct: parameters also (or only) used where no rule covers them.
        zero: biases that every use feeds into nothing but instance norms, which subtract them again.
        reentrant: whether a checkpoint hides a part of the graph.
    """

    uses: Counter[str]
    rules: Mapping[str, frozenset[str]]
    direct: frozenset[str]
    zero: frozenset[str]
    reentrant: bool

    def coverage(self, names: Iterable[str]) -> dict[str, frozenset[str]]:
        """Return the words of the coverage report for each parameter."""
        coverage = {name: frozenset({"unused"}) for name in names}
        coverage |= self.rules
        coverage |= dict.fromkeys(self.zero, frozenset({"zero"}))
        return coverage | dict.fromkeys(self.direct, frozenset({"fallback"}))


def read_graph(logits: Tensor, names: Mapping[int, str]) -> Graph:
    """Walk the graph behind the logits of a forward under `Rules`; `names` by the `id` of each parameter."""
    consumers = _consumers(logits.grad_fn)
    uses: Counter[str] = Counter()
    rules: dict[str, frozenset[str]] = {}
    direct: set[str] = set()
    zero: set[str] = set()
    felt: set[str] = set()
    for node, above in consumers.items():
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) in names:
            direct.add(names[id(variable)])
        for call in _calls(node):
            for name in call.names:
                uses[name] += 1
                rules[name] = rules.get(name, frozenset()) | {call.rule}
            if call.bias is not None:
                (zero if _is_removed(call, above) else felt).add(call.bias)
            if call.weight is not None:
                felt.add(call.weight)
    return Graph(uses, rules, frozenset(direct), frozenset(zero - felt - direct), _is_reentrant(consumers))


def hides_layers(forward: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Tell whether a forward of an example has reentrant checkpoints, also where no gradient enters one."""
    try:  # the outermost checkpoint has a node if its input requires gradients; a clone is no leaf
        logits = forward(x.detach().requires_grad_().clone())
    except InputError:  # it takes no such input, as where it makes it an array
        return False
    return _is_reentrant(_consumers(logits.grad_fn))


def _is_reentrant(nodes: Iterable[Any]) -> bool:
    return any(node.name() == _REENTRANT for node in nodes)


def _is_removed(call: Call, above: list[Any]) -> bool:
    """Tell whether a bias is a constant of each channel that only instance norms see."""
    shielded = (any(seen.invariant for seen in _calls(node)) for node in above)
    return call.shifts and bool(above) and all(shielded)


def _consumers(root: Any) -> dict[Any, list[Any]]:
    """Map each node of the graph to the nodes that take its output; holding all keeps their identity."""
    consumers: dict[Any, list[Any]] = {} if root is None else {root: []}
    waiting = list(consumers)
    while waiting:
        node = waiting.pop()
        for below, _ in node.next_functions:
            if below is None:
                continue
            if below not in consumers:
                consumers[below] = []
                waiting.append(below)
            consumers[below].append(node)
    return consumers


def _calls(node: Any) -> list[Call]:
    """Return the calls whose parameters may get their gradients at a node: its own, and that of its norm."""
    found = getattr(node, "call", None), getattr(getattr(node, "norm", None), "call", None)
    return [call for call in found if isinstance(call, Call)]
