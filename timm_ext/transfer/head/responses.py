"""What a network's logits are made of before its heads: one column for each parameter of an output."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from timm_ext.errors import InputError, first_line, listed
from timm_ext.inference import PredictSettings, predict_logits
from timm_ext.modes import evaluating
from timm_ext.networks.registry import channel_axes_of, heads_of
from timm_ext.parameters import matches, named_parameters

_MOST_BYTES = 1 << 29  # of the maps of one pass
_CLOSE = 1e-3  # of the largest logit: float32 through a whole network


@dataclass(frozen=True)
class Slot:
    """A tensor of a head.

    Attributes:
        name: of the parameter.
        axis: along which it has one place for each of the R outputs.
        shape: of the rest, whose elements are columns.
        columns: which.
    """

    name: str
    axis: int
    shape: tuple[int, ...]
    columns: range


class Responses:
    """A network with everything in front of its heads frozen, whose logits are φ(x) W.

    Where what follows the heads treats every output alike and is linear, such as a sum over coarser grids,
    the logits of voxel v and output r are Σ_k φ_vk W_kr: one column k for each element of the heads' weights
    and biases that belongs to one output. Heads that put out the identity in place of W give φ in a single
    pass. Heads that the logits do not depend on, as those of deep supervision, take no part.

    Args:
        network: made by `build_network`; it is not changed.
        image: `[C, D, H, W]`, one that the network takes, by which its heads are examined; it is computed on
            the image's device.
        fast_layers: as in `PredictSettings`.

    Attributes:
        slots: tensors of the heads that the logits depend on.
        columns: K, their number.
        outputs: R.

    Raises:
        InputError: the logits are not such a product.
    """

    def __init__(self, network: nn.Module, image: Tensor, *, fast_layers: bool = True) -> None:
        self._model = copy.deepcopy(network).to(image.device).requires_grad_(False)
        self._settings = PredictSettings(fast_layers=fast_layers)
        self._own = {name: self._parameter(name) for name in _names_of_heads(network)}
        with torch.enable_grad(), evaluating(self._model):
            for parameter in self._own.values():
                parameter.requires_grad_(True)
            logits = self._logits(image)
            found = torch.autograd.grad(logits.sum(), list(self._own.values()), allow_unused=True)
        self.outputs = logits.shape[1]
        used = [name for name, grad in zip(self._own, found, strict=True) if grad is not None]
        self.slots = tuple(
            _slots({name: self._own[name] for name in used}, channel_axes_of(network, "out_channels"))
        )
        if not self.slots:
            raise InputError("head: expected a network whose logits depend on its heads (got none such)")
        self.columns = self.slots[-1].columns.stop
        self._check(image)

    def tensors(self, weights: Tensor) -> dict[str, Tensor]:
        """Return the heads' tensors, by name, of W `[K, R]`."""
        result = {}
        for slot in self.slots:
            rows = weights[slot.columns.start : slot.columns.stop].T.reshape(-1, *slot.shape)
            own = self._own[slot.name]
            result[slot.name] = rows.movedim(0, slot.axis).to(own).contiguous()
        return result

    @torch.no_grad()
    def at(self, image: Tensor, voxels: Tensor) -> Tensor:
        """Return φ `[N, K]` float32 at some voxels of an image, given by their flat numbers `[N]`."""
        result = torch.empty(len(voxels), self.columns)
        step = max(1, _MOST_BYTES // (4 * image[0].numel()))
        for first in range(0, self.columns, step):
            part = range(first, min(first + step, self.columns))
            self._fill({slot.name: _identity(slot, part) for slot in self.slots})
            with evaluating(self._model):
                maps = self._logits(image)[0].flatten(1)
            result[:, part.start : part.stop] = maps[:, voxels.to(maps.device)].T.cpu()
        return result

    def _logits(self, image: Tensor) -> Tensor:
        try:
            return predict_logits(self._model, image[None], self._settings).float()
        except (RuntimeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"head: expected heads that may have any number of outputs ({first_line(error)})"
            ) from error

    @torch.no_grad()
    def _check(self, image: Tensor) -> None:
        """Compare the logits of random heads with their products."""
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(self.columns, self.outputs, generator=generator)
        voxels = torch.arange(0, image[0].numel(), max(1, image[0].numel() // 4096))
        expected = self.at(image, voxels) @ weights
        self._fill(self.tensors(weights))
        with evaluating(self._model):
            logits = self._logits(image)[0].flatten(1)[:, voxels.to(image.device)].T.cpu()
        if logits.shape != expected.shape or not torch.allclose(
            logits, expected, rtol=0, atol=_CLOSE * float(expected.abs().max())
        ):
            raise InputError(
                "head: expected logits that are affine in the parameters of the heads, the same way for "
                f"every output (got others of {listed(slot.name for slot in self.slots)})"
            )

    def _parameter(self, name: str) -> nn.Parameter:
        return self._model.get_parameter(name)

    def _fill(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            path, _, kind = name.rpartition(".")
            own = self._own[name]
            setattr(self._model.get_submodule(path), kind, nn.Parameter(tensor.to(own), requires_grad=False))


def _names_of_heads(network: nn.Module) -> list[str]:
    patterns = heads_of(network)
    return [name for name in named_parameters(network) if matches(name, patterns)]


def _slots(heads: Mapping[str, Tensor], axes: Mapping[str, tuple[int, ...]]) -> Iterator[Slot]:
    column = 0
    for name, tensor in heads.items():
        if len(axes.get(name, ())) != 1:
            raise InputError(
                f"head: expected tensors of heads with one axis along the outputs (got {name} "
                f"{list(tensor.shape)}), so that logits are affine in them"
            )
        (axis,) = axes[name]
        shape = tuple(length for place, length in enumerate(tensor.shape) if place != axis)
        size = tensor.numel() // tensor.shape[axis]
        yield Slot(name, axis, shape, range(column, column + size))
        column += size


def _identity(slot: Slot, part: Sequence[int]) -> Tensor:
    """Return the tensor of a head that puts out columns `part`."""
    rows = torch.zeros(len(part), len(slot.columns))
    for place, column in enumerate(part):
        if column in slot.columns:
            rows[place, column - slot.columns.start] = 1
    return rows.reshape(-1, *slot.shape).movedim(0, slot.axis).contiguous()
