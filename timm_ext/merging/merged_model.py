"""A network whose shared weights are a function of mixing logits."""

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from timm_ext.errors import InputError
from timm_ext.groups import Granularity, make_groups
from timm_ext.layout import check_compatible
from timm_ext.merging.bank import Bank
from timm_ext.merging.buffers import check_buffers, holds_buffers, ratios_beside, set_buffers
from timm_ext.merging.mixing import Mixing, merge_matrices, ratios_of, starting_logits
from timm_ext.parameters import buffer_owners, named_parameters, parameter_aliases, slots_of

_MOST_LISTED = 10_000  # logits of more groups than this stay out of a file's metadata


class MergedModel(nn.Module):
    """A network that merges its shared weights anew in each forward, so that the mixing can be learned.

    θ*_p = Σ_t α[g,t] F[t,p] θ[t,p] / Σ_t α[g,t] F[t,p] for the elements p of group g, with α from the
    logits δ: σ(δ[g,t]) / Σ_j σ(δ[g,j]) (`"sigmoid"`, T-IMM of Geyer et al., MIDL 2019), softmax
    (`"softmax"`), or the logits themselves divided by their sum (`"ratios"`). `"free"` is θ* = Σ_t δ[g,t] θ_t
    without Fishers, whose weights need not sum to 1 and may be negative.

    With an offset Δ `[P]`, which starts at 0, the shared weights are θ* + Δ: all of the network can be
    trained while the mixing still is, and `fold` gives the plain network.

    Parameters are `logits`, the offset if there is one, and the network's task-specific parameters, nothing
    else: the shared ones have empty slots in `network`. They exist during a forward, and after one that is to
    be differentiated until the next, so that activations can be computed anew in the backward
    (`torch.utils.checkpoint`, reentrant or not). The bank is a buffer
    that moves with the module and keeps its own dtype, be the network in another: a bank in half precision
    gives weights rounded to it. It is left out of `state_dict` (the sources have files of their own) and
    shared by deep copies.

    Buffers that belong to shared parameters, such as a batch norm's running statistics where norms are
    merged, are those of the source models, merged by the ratios of these parameters (see `Buffers`; free
    weights count by their share in the sum of their magnitudes). They follow the logits until a training
    forward, or a loaded state, gives the network others: those stay. All other buffers are the network's own.

    Each forward merges; call `fold()` first where the logits do not change, as in inference.

    Attributes:
        logits: δ, `[G, T]`.
        offset: Δ, `[P]`, or None.
        network: a copy of the given network without its shared parameters.
        layout: the shared parameters.
        sources: names of the T source models.
        group_names: `[G]`.
        granularity: of the groups.
        mixing: how ratios come from logits.
    """

    offset: nn.Parameter | None
    _like: Tensor
    _matrices: Tensor
    _offsets: Tensor
    _rows: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        bank: Bank,
        *,
        granularity: Granularity = "layer",
        mixing: Mixing = "sigmoid",
        initial_logits: Tensor | None = None,
        with_offset: bool = False,
    ):
        """Take a copy of `network`, and the bank as it is.

        Args:
            network: gives structure, task-specific parameters and buffers; its shared weights do not matter.
            bank: the source models; what its layout names is shared.
            granularity: which elements share a row of logits.
            mixing: see above.
            initial_logits: `[G, T]`, or what expands to it, such as `[T]`; None starts from equal ratios,
                which is IMM.
            with_offset: give the shared weights an offset of their own.

        Raises:
            InputError: the network lacks a tensor of the bank or has it in another shape, all of which are
                listed, the logits are not finite, of another shape, or negative ratios, or free weights meet
                Fishers.
        """
        super().__init__()
        parameters = named_parameters(network)
        check_compatible({"network": parameters}, layout=bank.layout)
        self.layout, self.sources = bank.layout, bank.sources
        self.granularity, self.mixing = granularity, mixing
        shared = set(bank.layout.names)
        aliases = parameter_aliases(network)
        self._aliases = {name: aliases[name] for name, _ in slots_of(network) if aliases.get(name) in shared}
        self._views = _views_of_aliases(network, self._aliases)
        self.network = copy.deepcopy(network)
        for name in self._aliases:
            _set(self.network, name, None)
        self.network.requires_grad_(True)
        groups = make_groups(bank.layout, granularity)
        self.group_names = groups.names
        own_rows = torch.equal(groups.rows, torch.arange(len(groups.rows)))
        self.register_buffer("_matrices", bank.matrices, persistent=False)
        self.register_buffer("_offsets", groups.offsets, persistent=False)
        self.register_buffer("_rows", None if own_rows else groups.rows, persistent=False)
        # Has the dtype of the shared weights, also after the module was moved to another.
        self.register_buffer("_like", parameters[bank.layout.names[0]].new_empty(0), persistent=False)
        # DistributedDataParallel would send the bank to all ranks in each forward.
        self._ddp_params_and_buffers_to_ignore = ["_matrices", "_offsets", "_rows", "_like"]
        if mixing == "free" and bank.fisher is not None:
            raise InputError("mixing: expected a bank without Fishers for 'free' weights (got one with them)")
        self.logits = nn.Parameter(starting_logits(initial_logits, (len(groups.names), len(bank)), mixing))
        offset = nn.Parameter(self._like.new_zeros(bank.layout.numel)) if with_offset else None
        self.register_parameter("offset", offset)
        check_buffers(network, bank.buffers.shapes())
        # Which buffers are merged is for the bank to say.
        self._owners = buffer_owners(network, bank.layout.names, transfer_norms=True)
        self._buffers_of_sources = bank.buffers
        self._merged_buffers = self._merge_buffers()
        set_buffers(self.network, self._merged_buffers)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network on the merged weights; takes and returns what the network does."""
        if not (self.training or torch.compiler.is_compiling()):
            self._follow()
        self._take_back()
        merged = self.merge()
        # Ties among the shared parameters are resolved; nothing is left to look for.
        out = torch.func.functional_call(self.network, self._shared(merged), args, kwargs, tie_weights=False)
        if torch.is_grad_enabled() and _is_plain(merged):
            self._leave(merged)
        return out

    def merge(self) -> Tensor:
        """Return the shared weights `[P]`, θ* or θ* + Δ, in the network's dtype; differentiable."""
        elements = self.layout.numel
        fisher = self._matrices[1, :, :elements] if len(self._matrices) > 1 else None
        theta = self._matrices[0, :, :elements]
        narrow = theta.dtype == torch.float16 and self._like.dtype != torch.float16
        scale = _GradientScale() if narrow else None
        logits = self.logits if scale is None else scale.leave(self.logits)
        merged = merge_matrices(theta, fisher, logits, self._offsets, mixing=self.mixing, groups=self._rows)
        merged = merged.to(self._like.dtype)
        merged = merged if scale is None else scale.enter(merged)
        return merged if self.offset is None else merged + self.offset

    def ratios(self) -> Tensor:
        """Return the mixing ratios α `[G, T]`, detached; each row sums to 1 unless the weights are free."""
        return ratios_of(self.logits.detach(), self.mixing)

    def specific_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the network that are not merged: heads and, unless transferred, norms."""
        return list(named_parameters(self.network).values())

    def fold(self) -> nn.Module:
        """Return a plain copy of the network with the merged weights, all of them trainable."""
        self._follow()
        left = self._take_back()
        network = copy.deepcopy(self.network)
        self._put(left)
        with torch.no_grad():
            merged = self.layout.split(self.merge())
        folded = {name: nn.Parameter(tensor.clone()) for name, tensor in merged.items()}
        for name, first in self._aliases.items():
            view = self._view(name, folded[first])
            _set(network, name, view if isinstance(view, nn.Parameter) else nn.Parameter(view.detach()))
        return network

    def provenance(self) -> dict[str, Any]:
        """Return how the weights come about, as JSON values for a file's metadata.

        The logits are among them unless there are more than ten thousand groups, whose mean ratios stand
        for them.
        """
        facts: dict[str, Any] = {
            "sources": list(self.sources),
            "granularity": self.granularity,
            "mixing": self.mixing,
            "fisher": len(self._matrices) > 1,
            "mean_ratios": self.ratios().mean(dim=0).tolist(),
        }
        if len(self.group_names) <= _MOST_LISTED:
            facts |= {"groups": list(self.group_names), "logits": self.logits.detach().tolist()}
        return facts

    def extra_repr(self) -> str:
        """Describe the merge beside the network's own description."""
        return (
            f"sources={', '.join(self.sources)}, shared elements={self.layout.numel}, "
            f"granularity={self.granularity}, mixing={self.mixing}"
        )

    def _merge_buffers(self) -> dict[str, Tensor]:
        """Merge the buffers of the sources by the ratios of now."""
        alpha = self.ratios().cpu()
        if self.mixing == "free":
            alpha = alpha.abs() + torch.finfo(alpha.dtype).tiny  # equal shares where all weights are 0
            alpha = alpha / alpha.sum(dim=1, keepdim=True)
        places = self.layout, alpha, self._offsets.cpu(), None if self._rows is None else self._rows.cpu()
        ratios = {
            name: ratios_beside(rows.shape[1:], self._owners.get(name, self.layout.names), *places)
            for name, rows in self._buffers_of_sources.values.items()
        }
        return self._buffers_of_sources.merged(ratios)

    def _follow(self) -> None:
        """Merge the network's buffers anew if they are still those of the last merge and the logits moved."""
        if not self._merged_buffers:
            return
        if holds_buffers(self.network, self._merged_buffers):
            self._merged_buffers = self._merge_buffers()
            set_buffers(self.network, self._merged_buffers)

    def _shared(self, merged: Tensor) -> dict[str, Tensor]:
        """Return the shared parameters by every name of theirs."""
        parts = self.layout.split(merged)
        return {name: self._view(name, parts[first]) for name, first in self._aliases.items()}

    def _leave(self, merged: Tensor) -> None:
        """Leave the weights of a forward in the network, where a checkpoint of activations looks for them.

        A reentrant one walks their graph once for each of its parts, so they have a graph that can be walked
        repeatedly.
        """
        value = merged.detach()
        if merged.requires_grad:
            value = _Repeatable.apply(  # type: ignore[no-untyped-call]
                weakref.ref(self), value, self.logits, self.offset
            )
        self._put(self._shared(value))

    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            path, _, last = name.rpartition(".")
            vars(self.network.get_submodule(path))[last] = tensor

    def _take_back(self) -> dict[str, Tensor]:
        """Empty the slots of the shared weights, and return what an earlier forward left there."""
        left = {}
        for name in self._aliases:
            path, _, last = name.rpartition(".")
            if (tensor := vars(self.network.get_submodule(path)).pop(last, None)) is not None:
                left[name] = tensor
        return left

    def _view(self, name: str, tensor: Tensor) -> Tensor:
        """Return a merged tensor as the parameter `name` sees it."""
        if name not in self._views:
            return tensor
        shape, stride = self._views[name]
        return tensor.reshape(-1).as_strided(shape, stride)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MergedModel":
        """Move the bank, too, but as bytes: Fishers would leave the range of another dtype."""
        self._take_back()
        dtype = self._matrices.dtype
        self._matrices = self._matrices.view(torch.uint8)
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._matrices = self._matrices.view(dtype)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "MergedModel":
        memo[id(self._matrices)] = self._matrices  # constant and large
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        left = self._take_back()
        for key, value in vars(self).items():
            vars(twin)[key] = copy.deepcopy(value, memo)
        self._put(left)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        self._take_back()
        return vars(self)


class _Repeatable(torch.autograd.Function):
    """The merged weights with a graph of one node that merges anew when it is walked, however often."""

    @staticmethod
    def forward(ctx: Any, model: Any, value: Tensor, logits: Tensor, offset: Tensor | None) -> Tensor:
        ctx.model = model
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        model = ctx.model()
        wanted = [None, None, model.logits, model.offset]
        inputs = [tensor for tensor, needed in zip(wanted, ctx.needs_input_grad, strict=True) if needed]
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            merged = model.merge()
        found = iter(torch.autograd.grad(merged, inputs, grads[0], create_graph=differentiable))
        return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)


def _is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor outlives the call it is made in: no compiler or transform is at work."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        or forward_ad.unpack_dual(tensor).tangent is not None
    )


class _GradientScale:
    """Brings a gradient into the range of float16 inside the merge, by a power of two.

    Most entries of a weight's gradient can lie below 6e-8, where float16 ends.
    """

    _PEAK_EXPONENT = 15  # of the largest entry, of which float16 has 65504

    def enter(self, merged: Tensor) -> Tensor:
        """Scale the gradient of `merged` `[P]`, which is wider than float16."""
        if merged.requires_grad:
            merged.register_hook(self._scale)
        return merged

    def leave(self, logits: Tensor) -> Tensor:
        """Return the logits, whose gradient is scaled back."""
        if not logits.requires_grad:
            return logits
        logits = logits.view_as(logits)
        logits.register_hook(self._unscale)
        return logits

    def _scale(self, grad: Tensor) -> Tensor:
        exponent = torch.frexp(grad.abs().amax()).exponent
        one = torch.ones((), dtype=grad.dtype, device=grad.device)
        self._factor = torch.ldexp(one, (self._PEAK_EXPONENT - exponent).clamp(max=126))
        return grad * self._factor

    def _unscale(self, grad: Tensor) -> Tensor:
        return grad / self._factor


def _views_of_aliases(
    network: nn.Module, aliases: Mapping[str, str]
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return shape and stride of the tied parameters that see the memory of their first name differently."""
    return dict(_different_views(dict(network.named_parameters(remove_duplicate=False)), aliases))


def _different_views(
    parameters: Mapping[str, nn.Parameter], aliases: Mapping[str, str]
) -> Iterator[tuple[str, tuple[tuple[int, ...], tuple[int, ...]]]]:
    for name, first in aliases.items():
        tensor, original = parameters[name], parameters[first]
        if tensor.shape == original.shape and tensor.stride() == original.stride():
            continue
        if not original.is_contiguous():
            raise InputError(f"{name}: expected a view of a contiguous parameter (got a view of {first})")
        yield name, (tuple(tensor.shape), tensor.stride())


def _set(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    """Put a parameter, or nothing, into the slot of that name; the order of slots stays."""
    path, _, last = name.rpartition(".")
    module.get_submodule(path)._parameters[last] = parameter
