"""The backward of a forward under the rules: squares of its parameters' gradients, example by example."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from timm_ext.fisher.graph import Graph
from timm_ext.fisher.rules import Rules
from timm_ext.fisher.squares import SquareSums
from timm_ext.fisher.tape import Tape
from timm_ext.layers.gradients import ExampleGradients


def square_gradients(
    logits: Tensor,
    scores: Iterable[Tensor],
    graph: Graph,
    tape: Tape,
    parameters: Mapping[str, Tensor],
    sums: Mapping[str, Tensor],
    samples: int,
) -> None:
    """Add 1/S · (gradient of example b)² to the sums, over examples b and samples; no `.grad` is touched.

    Args:
        logits: `[B, K, ...]`, of a forward under `Rules(tape)`.
        scores: the gradient of the log-likelihood with respect to the logits for each sample.
        graph: as read from the logits; `graph.direct` is empty, or B is 1: what autograd sums over the batch
            is then the gradient of the example.
        tape: of that forward.
        parameters: by name.
        sums: of all parameters, by name.
        samples: number of scores S.
    """
    assert tape.batch == 1 or not graph.direct
    direct = sorted(graph.direct)
    uses = {name: count for name, count in graph.uses.items() if name not in graph.zero}
    uses |= {name: uses.get(name, 0) + 1 for name in direct}
    for number, score in enumerate(scores, start=1):
        if not uses:
            continue
        squares = tape.squares = SquareSums(sums, uses, 1 / samples)
        wanted = [parameters[name] for name in direct]
        gradients = _run(logits, score, tape, wanted, retain_graph=number < samples)
        for name, gradient in zip(direct, gradients, strict=True):
            if gradient is not None:
                squares.deposit(name, ExampleGradients(1, [gradient.contiguous()].__getitem__))
        squares.finish()


def _run(
    logits: Tensor, score: Tensor, tape: Tape, parameters: list[Tensor], *, retain_graph: bool
) -> tuple[Tensor | None, ...]:
    """Send `score` back from `logits` through every recorded call; return the gradients of `parameters`.

    The rules stay active, since a checkpointed layer runs its forward again here. `torch.autograd.grad` and
    `backward` are themselves functions that a mode intercepts, and run their engine with it switched off;
    hence the call of the engine itself.
    """
    with Rules(tape):
        gradients: tuple[Tensor | None, ...] = torch.autograd.Variable._execution_engine.run_backward(
            (logits,),
            (score,),
            retain_graph,
            False,
            (tape.anchor, *parameters),
            allow_unreachable=True,
            accumulate_grad=False,
        )
    return gradients[1:]
