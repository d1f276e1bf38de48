"""Training that stays near its starting weights: L2-transfer, drop-transfer, scaled layers."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from timm_ext.data.noise import keyed_generator
from timm_ext.errors import InputError, listed
from timm_ext.layout import Entry, Layout
from timm_ext.parameters import named_parameters, slots_of
from timm_ext.training.settings import TIES, TrainSettings


class Tie:
    """Ties parameters θ to the values θ_0 that they have when it is made.

    L2-transfer adds λ ‖θ − θ_0‖² to the loss, a precision Λ adds ½ Σ_p Λ_p (θ_p − θ_0,p)². Drop-transfer
    puts, in each training step, an output channel of a layer back to θ_0 with probability p and enlarges the
    steps of the others, so that the mean is θ:

        θ_0 + m / (1 − p) · (θ − θ_0),    m ~ Bernoulli(1 − p) for weight and bias of each output channel

    Validation and the trained network use θ. Scaled layers (LiNeS) leave behind the last step, in the network
    that is returned, of the change of the tied layer l = 0 … L − 1, in the order in which the network names
    them, the share ρ_l:

        θ_0 + ρ_l (θ − θ_0),    ρ_l = 1 − s (1 − l / (L − 1)), and 1 where L = 1

    λ = 0, p = 0 and s = 0 change nothing.

    Sources: Wang et al., LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging,
    arXiv 2410.17146; Lee et al., Overcoming Catastrophic Forgetting by Incremental Moment Matching, NeurIPS
    2017, section 4, where the first two belong to the training of each source network from the one before;
    L2-transfer to a new task is L2-SP, Li et al., Explicit Inductive Bias for Transfer Learning with
    Convolutional Networks, ICML 2018.

    Args:
        model: where it is trained, on its device.
        names: of its tied parameters.
        settings: with λ (`l2_transfer`), p (`drop_transfer`), the seed of the channels that are dropped, and
            s (`layer_scaling`).
        precision: Λ of some of these parameters by name.

    Attributes:
        start: θ_0 by name.
        precision: Λ by name, on the parameters' device.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        settings: TrainSettings,
        precision: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._layout = Layout.from_model(model, names)
        every = named_parameters(model)
        self._parameters = {name: every[name] for name in names}
        self._weight, self._rate, self._seed = settings.l2_transfer, settings.drop_transfer, settings.seed
        self._taken_back = settings.layer_scaling
        self.start = {name: value.detach().clone() for name, value in self._parameters.items()}
        given = precision or {}
        self.precision = {
            name: given[name].detach().to(value, copy=True)
            for name, value in self._parameters.items()
            if name in given
        }

    def penalty(self) -> Tensor | float:
        """Return λ ‖θ − θ_0‖² + ½ Σ_p Λ_p (θ_p − θ_0,p)²."""
        terms = []
        for name, value in self._parameters.items() if self._weight or self.precision else ():
            square = (value - self.start[name]).square()
            if self._weight:
                terms.append(self._weight * square.sum())
            if name in self.precision:
                terms.append((self.precision[name] * square).sum() / 2)
        return torch.stack(terms).sum() if terms else 0.0

    def forward(self, module: nn.Module, images: Tensor, step: int) -> object:
        """Return what a module that holds the model makes of images, this step's channels dropped.

        All processes drop the same channels.
        """
        if not self._rate or not self._parameters:
            return module(images)
        masks = self._masks(step)
        mixed: dict[Tensor, Tensor] = {
            value: torch.lerp(self.start[name], value, masks[name].to(value))
            for name, value in self._parameters.items()
        }
        named = {place: mixed[value] for place, value in slots_of(module) if value in mixed}
        return functional_call(module, named, (images,), tie_weights=False)

    @torch.no_grad()
    def scale_layers(self) -> None:
        """Leave of the change of each tied layer the share ρ_l."""
        if not self._taken_back:
            return
        layers = list(dict.fromkeys(entry.layer for entry in self._layout.entries))
        for entry in self._layout.entries:
            height = layers.index(entry.layer) / (len(layers) - 1) if len(layers) > 1 else 1.0
            value, kept = self._parameters[entry.name], 1 - self._taken_back * (1 - height)
            value.copy_(torch.lerp(self.start[entry.name], value, kept))

    def restore(self, start: Mapping[str, Tensor], precision: Mapping[str, Tensor]) -> None:
        """Take over θ_0 and Λ of a run that is resumed."""
        for own, saved in ((self.start, start), (self.precision, precision)):
            for name, value in own.items():
                value.copy_(saved[name])

    def _masks(self, step: int) -> dict[str, Tensor]:
        """Return m / (1 − p) for each tensor, shaped to be broadcast; a layer's tensors agree in it."""
        generator = keyed_generator("drop-transfer", self._seed, step)
        drawn: dict[tuple[str, int], Tensor] = {}
        masks = {}
        for entry in self._layout.entries:
            key = entry.layer, entry.out_channels
            if key not in drawn:
                kept = torch.from_numpy(generator.random(entry.out_channels) >= self._rate)
                drawn[key] = kept.float() / (1 - self._rate)
            masks[entry.name] = _by_channel(drawn[key], entry)
        return masks


def make_tie(
    model: nn.Module,
    names: Collection[str] | None,
    settings: TrainSettings,
    precision: Mapping[str, Tensor] | None = None,
) -> Tie:
    """Tie those of the named parameters (None: of all) that are trained; none without λ, p, s and Λ.

    Raises:
        InputError: a name is not a parameter of the model.
    """
    if not precision and not any(getattr(settings, name) for name in TIES):
        return Tie(model, (), settings)
    parameters = named_parameters(model)
    names = parameters.keys() if names is None else names
    if unknown := sorted(set(names) - parameters.keys()):
        raise InputError(f"tied: expected names of the model's parameters (got {listed(unknown)})")
    chosen = set(names)
    trained = [name for name, value in parameters.items() if name in chosen and value.requires_grad]
    return Tie(model, trained, settings, precision)


def _by_channel(values: Tensor, entry: Entry) -> Tensor:
    """Shape values of the output channels `[C_out]` so that they are broadcast over an entry's tensor."""
    inner = [1] * (len(entry.shape) - 1)
    if entry.out_dim is None:
        return values.reshape(())
    if entry.out_dim == 0:
        return values.reshape(-1, *inner)
    rows = values.reshape(entry.channel_groups, -1).repeat_interleave(
        entry.shape[0] // entry.channel_groups, dim=0
    )
    return rows.reshape(*rows.shape, *inner[1:])
