"""Sums of squared per-example gradients, batch by batch."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, distributed, nn

from timm_ext.errors import InputError, listed
from timm_ext.fisher.backward import square_gradients
from timm_ext.fisher.batch import applied, check_labels, check_surroundings, checked_batch
from timm_ext.fisher.graph import Graph, hides_layers, read_graph
from timm_ext.fisher.likelihoods import (
    Likelihood,
    LogLikelihood,
    example_keys,
    get_likelihood,
    require_finite,
    summed_logits,
)
from timm_ext.fisher.micro_batch import MicroBatch, check_micro_batch, divisible, micro_batches
from timm_ext.fisher.model import examine_model, no_randomness
from timm_ext.fisher.partial import Partial
from timm_ext.fisher.precision import autocast, check_precision, precise, tolerance
from timm_ext.fisher.reduction import Share, add_over_ranks, all_gather
from timm_ext.fisher.result import Fisher, FisherKind, unused_note
from timm_ext.fisher.rules import Rules, close_modes, open_modes
from timm_ext.fisher.tape import Tape
from timm_ext.fisher.unused import cut_off
from timm_ext.fisher.unwrap import bare_network, plain, uncompiled
from timm_ext.modes import evaluating
from timm_ext.ops.memory import kept_memory, release_memory

_REENTRANT = (
    "model: expected activation checkpointing with use_reentrant=False, or none (got reentrant "
    "checkpointing, which hides its layers from the graph)"
)


class FisherAccumulator:
    """Accumulates the diagonal Fisher F = 1/N Σ_n 1/S Σ_s (∂ log p(y_ns | x_n) / ∂θ)² over batches.

    Exact per example whatever the batch size: one batched forward and backward, in which each layer squares
    its gradients example by example and frees its input. Examples go one by one through a model with a
    parameter that no rule covers, or with a layer whose first axis is not the batch. No `.grad` is touched.
    The result does not depend on batch size, order, process or number of threads beyond rounding (about 1e-6
    of a tensor's largest value: products of matrices share sums among threads), since sampled labels are
    keyed on seed, example id and sample index.

    Use as a context manager: inside, the model is in eval mode.

        with FisherAccumulator(model) as accumulator:
            for x, y, ids in batches:
                accumulator.update(x, y, ids)
        fisher = accumulator.result()

    Args:
        model: from `[B, ...]` to logits `[B, K, ...]`, or to several such maps, which are added. Wrappers are
            taken off (`bare_network`), compiled parts run uncompiled; TorchScript works, more slowly.
        likelihood: `bernoulli`, `categorical`, `dice`, a `Likelihood`, or a function of logits `[B, K, ...]`
            and target that returns log-likelihoods `[B]`.
        labels: `sampled` from the network's own prediction (the Fisher) or `true` (the empirical Fisher).
        samples: labels drawn for each example S; they share one forward.
        seed: of the sampled labels.
        strict: refuse frozen and tied parameters; otherwise frozen ones are left out, tied ones counted once.
            Unused ones have F = 0 and are named (`Fisher.unused`); ones that change the output although no
            gradient reaches them are refused.
        precision: `ieee` (the parameters' own type), `tf32` (on CUDA by cuDNN; the fused convolution kernel
            is IEEE only), `bf16-mixed` or `16-mixed`. Sums are float32, or float64 for float64 parameters.
        micro_batch: examples of an update that go through the model at a time, None for all of them; `auto`
            is all of them on a GPU, and on a CPU as many as pay (see `examples_at_a_time`). It changes speed
            and memory, and the result by rounding alone.

    Raises:
        InputError: an option is not known, or the model's Fisher is not defined (the parameters are named).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        likelihood: str | Likelihood | LogLikelihood = "bernoulli",
        labels: str = "sampled",
        samples: int = 1,
        seed: int = 0,
        strict: bool = True,
        precision: str = "ieee",
        micro_batch: MicroBatch = "auto",
    ):
        self._likelihood = get_likelihood(likelihood)
        check_labels(self._likelihood, labels, samples, seed)
        check_precision(precision)
        check_micro_batch(micro_batch)
        self._model, self._micro_batch = bare_network(model), micro_batch
        self._labels, self._samples, self._seed = labels, samples, seed
        self._precision = precision
        self._tracked = examine_model(self._model, strict=strict)
        self._sums = {
            name: torch.zeros_like(
                p, dtype=torch.promote_types(p.dtype, torch.float32), memory_format=torch.contiguous_format
            ).requires_grad_(False)
            for name, p in self._tracked.parameters.items()
        }
        self._ids: dict[str, None] = {}
        self._coverage: dict[str, frozenset[str]] = {}
        self._zero: frozenset[str] | None = None
        self._refused: set[str] = set()
        self._probed: set[bool] = set()
        self._without_effect: set[str] = set()
        self._one_by_one = False
        self._broken = False
        self._reduced = False
        self._open = ExitStack()
        self._inside = False

    def __enter__(self) -> "FisherAccumulator":
        """Put the model in eval mode."""
        self._open.enter_context(evaluating(self._model))
        self._open.enter_context(kept_memory())
        self._inside = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give every module its own mode back."""
        self._inside = False
        self._open.close()

    def update(self, x: Tensor, y: Any, ids: Sequence[str]) -> None:
        """Add the squared gradients of a batch.

        Args:
            x: `[B, ...]`, on the model's device.
            y: true labels for `labels="true"`: `[B, R, D, H, W]` of 0 and 1 (bernoulli, dice), `[B, D, H, W]`
                int64 (categorical), anything for a function; not read for sampled labels, may be None.
            ids: name of each example, unique over all updates.

        Raises:
            InputError: input, labels or log-likelihood cannot be used (the example is named), or a parameter
                is not covered. Nothing of the micro-batch has then been added.
        """
        self._check_usable()
        x, names = checked_batch(x, ids, self._ids)
        require_finite(x, names, "x")
        labels = y if self.needs_target else None
        parameters = sum(total.numel() for total in self._sums.values())
        modes = open_modes()
        try:
            size = 1 if self._one_by_one else self._micro_batch
            for part in micro_batches(size, x, labels, names, parameters):
                self._add(*part)
        finally:
            close_modes(modes)

    def _add(self, x: Tensor, y: Any, names: list[str]) -> None:
        """Add the squared gradients of a micro-batch, all of them, or be broken from then on.

        Where a parameter has no rule, examples go one by one: a rule is only needed to tell them apart.
        """
        with torch.enable_grad(), precise(self._precision, x.device), uncompiled():
            alone = self._probe(x)
            tape = Tape(len(x), self._tracked.names, x.device, self._refused)
            with Rules(tape):
                logits = self._forward(x)
            self._check_logits(logits, names, alone)
            graph = read_graph(logits, self._tracked.names)
            self._check_graph(graph, x)
            if len(x) > 1 and graph.direct and divisible(x, y):
                self._one_by_one = True
                del logits, graph, tape
                for part in micro_batches(1, x, y, names, parameters=0):
                    self._add(*part)
                return
            self._accumulate(x, y, names, logits, graph, tape)
        self._note(graph.coverage(self._sums), graph.zero)
        self._ids.update(dict.fromkeys(names))
        self._broken = False  # last: sums and examples agree again, whatever came in between

    @property
    def needs_target(self) -> bool:
        """Whether updates read true labels."""
        return self._labels == "true"

    @property
    def broken(self) -> bool:
        """Whether an update failed half-way, so that the sums are of no use."""
        return self._broken

    def partial(self) -> Partial:
        """Return the sums so far, not copied, and the examples seen.

        Raises:
            InputError: an update failed half-way.
        """
        self._check_whole("partial")
        return Partial(dict(self._sums), tuple(self._ids), dict(self._coverage), self._zero, self._settings())

    def restore(self, partial: Partial) -> None:
        """Go on from what an accumulator of the same model and settings held.

        Raises:
            InputError: this one has seen examples.
        """
        if self._ids:
            raise InputError(f"restore: expected an accumulator without examples (got {len(self._ids)})")
        self._broken = True
        for name, total in self._sums.items():
            total.copy_(partial.sums[name])
        self._ids = dict.fromkeys(partial.ids)
        self._note(partial.coverage, partial.zero)
        self._broken = False

    def _settings(self) -> str:
        return (
            f"likelihood={self._likelihood.name} labels={self._labels} samples={self._samples} "
            f"seed={self._seed} precision={self._precision}"
        )

    def all_reduce(self) -> None:
        """Add sums and counts of all processes of `torch.distributed`, in float64; nothing without them.

        Raises:
            InputError: on all ranks alike, if models or settings differ or an example was seen twice.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        if self._reduced:
            raise InputError("all_reduce: expected one call (got another)")
        shares = all_gather(
            Share(
                settings=self._settings(),
                shapes={name: tuple(tensor.shape) for name, tensor in self._sums.items()},
                ids=tuple(self._ids),
                coverage=dict(self._coverage),
                zero=self._zero,
                broken=self._broken,
            )
        )
        self._broken = True
        add_over_ranks(self._sums)
        self._reduced = True
        self._ids = {id: None for share in shares for id in share.ids}
        for share in shares:
            self._note(share.coverage, share.zero)
        self._broken = False

    def result(self) -> Fisher:
        """Return the mean over the examples seen; the memory of the passes goes back to the system before.

        Raises:
            InputError: there was no example, an update failed half-way, or a sum is not finite.
        """
        self._check_whole("Fisher")
        if not self._ids:
            raise InputError("Fisher: expected at least one example (got none)")
        release_memory()
        tensors = {name: total / len(self._ids) for name, total in self._sums.items()}
        if bad := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
            raise InputError(
                f"Fisher: expected finite values (got overflow in {listed(bad)}; use precision='ieee')"
            )
        unused = tuple(name for name in tensors if self._coverage.get(name) == frozenset({"unused"}))
        if unused:
            warnings.warn(unused_note(unused), stacklevel=2)
        return Fisher(
            tensors=tensors,
            count=len(self._ids),
            kind=FisherKind.of(self._likelihood.name, self._labels),
            scaling=self._likelihood.scaling,
            zero=tuple(name for name in tensors if name in (self._zero or ())),
            unused=unused,
            samples=self._samples,
            seed=self._seed if self._labels == "sampled" else None,
        )

    def coverage(self) -> dict[str, str]:
        """Return which rule gave each parameter's Fisher.

        Returns:
            By name: names of rules joined by ` + `, `fallback` (no rule: autograd, examples one by one),
            `zero` (by structure), `unused`, `frozen`, or `not seen` before the first update.
        """
        seen = {name: " + ".join(sorted(self._coverage.get(name, {"not seen"}))) for name in self._sums}
        return seen | dict.fromkeys(self._tracked.frozen, "frozen")

    def _forward(self, x: Tensor) -> Tensor:
        with autocast(self._precision, x.device):
            return summed_logits(applied(self._model, x))

    def _probe(self, x: Tensor) -> Tensor | None:
        """Run the first example alone, once at first and once beside others; return its logits.

        It shows layers whose first axis is not the batch, random numbers, and examples that influence others.
        """
        beside_others = len(x) > 1
        if beside_others in self._probed or True in self._probed:
            return None
        tape = Tape(1, self._tracked.names, x.device, self._refused)
        with no_randomness(x.device), Rules(tape):
            logits = self._forward(x[:1]).detach()
        self._probed.add(beside_others)
        return logits

    def _check_logits(self, logits: Tensor, ids: Sequence[str], alone: Tensor | None) -> None:
        if logits.shape[0] != len(ids):
            raise InputError(f"network output: expected [{len(ids)}, ...] (got {list(logits.shape)})")
        require_finite(logits.detach(), ids, "network output")
        if alone is None:
            return
        beside = logits.detach()[:1]
        limit = tolerance(self._precision, logits.dtype) * float(logits.detach().abs().max())
        if alone.shape != beside.shape or float((alone - beside).abs().max()) > limit:
            raise InputError(
                "model: expected examples that do not influence one another (got another output for "
                f"{ids[0]} alone than within its batch)"
            )

    def _check_graph(self, graph: Graph, x: Tensor) -> None:
        """Refuse a graph that does not reach parameters on which the output depends."""
        if graph.reentrant:
            raise InputError(_REENTRANT)
        unreached = {
            name: self._tracked.parameters[name]
            for name in self._sums
            if name not in graph.uses and name not in graph.direct and name not in self._without_effect
        }
        if not unreached:
            return
        limit = tolerance(self._precision, next(iter(unreached.values())).dtype)
        if lost := cut_off(self._forward, x[:1], unreached, limit):
            raise InputError(
                _REENTRANT
                if hides_layers(self._forward, x[:1])
                else "model: expected a gradient for all parameters on which the output depends (got none "
                f"for {listed(lost)}: detach, no_grad or reentrant checkpointing cuts them off; freeze them "
                "and pass strict=False to leave them out)"
            )
        self._without_effect |= unreached.keys()

    def _accumulate(
        self, x: Tensor, y: Any, ids: Sequence[str], logits: Tensor, graph: Graph, tape: Tape
    ) -> None:
        total = self._tracked.parameters, self._sums, self._samples
        scores = self._scores(logits.detach(), y, ids)
        if len(x) == 1 or not graph.direct:
            square_gradients(logits, scores, graph, tape, *total)
            return
        among_others = list(scores)
        for index in range(len(x)):
            part = slice(index, index + 1)
            tape = Tape(1, self._tracked.names, x.device, self._refused)
            with Rules(tape):
                alone = self._forward(x[part])
            graph = read_graph(alone, self._tracked.names)
            square_gradients(alone, (score[part] for score in among_others), graph, tape, *total)

    def _scores(self, logits: Tensor, y: Any, ids: Sequence[str]) -> Iterator[Tensor]:
        """Yield the gradient of the log-likelihood for each sample; sums change from then on."""
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        for sample in range(self._samples):
            score = self._score(wide, y, ids, sample).to(logits.dtype)
            self._broken = True
            yield score

    def _score(self, logits: Tensor, y: Any, ids: Sequence[str], sample: int) -> Tensor:
        if self._labels == "sampled":
            keys = example_keys(ids, seed=self._seed, sample=sample).to(logits.device)
            return self._likelihood.sampled_score(logits, keys, ids)
        target = plain(y).to(logits.device) if isinstance(y, Tensor) else y
        self._likelihood.check(logits, target, ids)
        return self._likelihood.score(logits, target, ids)

    def _note(self, coverage: dict[str, frozenset[str]], zero: frozenset[str] | None) -> None:
        for name, rules in coverage.items():
            self._coverage[name] = self._coverage.get(name, frozenset()) | rules
        if zero is not None:
            self._zero = zero if self._zero is None else self._zero & zero

    def _check_usable(self) -> None:
        if not self._inside:
            raise InputError("update: expected a call inside `with accumulator:` (got one outside)")
        if self._reduced:
            raise InputError("update: expected no call after all_reduce (got one)")
        self._check_whole("update")
        check_surroundings()

    def _check_whole(self, what: str) -> None:
        if self._broken:
            raise InputError(f"{what}: expected whole updates (got one that failed half-way: start again)")
