"""The 3-D U-Net with residual context modules that Isensee et al. entered in BraTS 2017."""

from typing import cast

import torch
from torch import Tensor, nn

from timm_ext.errors import InputError

DEEP_SUPERVISION_LEVELS = 3  # the finest decoder levels that carry a segmentation head
MOST_LEVELS = 16  # of edges that are multiples of 2^15


class Isensee2017(nn.Module):
    """Residual 3-D U-Net with summed segmentation heads; returns logits.

    Source: Isensee, Kickingereder, Wick, Bendszus, Maier-Hein, "Brain Tumor Segmentation and Radiomics
    Survival Prediction: Contribution to the BRATS 2017 Challenge", Fig. 1. With the default options it has
    30 convolutions, 27 affine instance norms and 8,269,561 parameters.

    Encoder level l has f_l = base_filters · 2^l channels: x = block(x, stride 2 for l > 0), then
    x + block(dropout(block(x))), where block = 3³ convolution, instance norm, LeakyReLU. A decoder level
    doubles the grid (nearest neighbour, 3³ block), concatenates the encoder's features and localises
    (3³ block, 1³ block). The three finest decoder levels (fewer in a shallow network) end in a 1³ head;
    the heads' maps are summed upward.

    Args:
        in_channels: input images, 4 in the paper.
        out_channels: output regions R.
        base_filters: channels f_0 of the finest level.
        levels: depth; every input edge must be divisible by 2^(levels-1).
        dropout: probability with which a whole channel is dropped between the two blocks of a context module.
        negative_slope: slope of LeakyReLU below zero; 0.3 in the authors' Keras code.
    """

    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 3,
        base_filters: int = 16,
        levels: int = 5,
        dropout: float = 0.3,
        negative_slope: float = 0.01,
    ) -> None:
        super().__init__()
        _check_options(in_channels, out_channels, base_filters, levels, dropout)
        filters = [base_filters * 2**level for level in range(levels)]
        inputs = [in_channels, *filters[:-1]]
        supervised = min(DEEP_SUPERVISION_LEVELS, levels - 1)
        self.size_divisor = 2 ** (levels - 1)
        self.encoder = nn.ModuleList(
            _EncoderLevel(inputs[level], filters[level], 1 if level == 0 else 2, dropout, negative_slope)
            for level in range(levels)
        )
        self.decoder = nn.ModuleList(
            _DecoderLevel(filters[level + 1], filters[level], negative_slope)
            for level in reversed(range(levels - 1))
        )
        self.heads = nn.ModuleList(
            nn.Conv3d(filters[level], out_channels, kernel_size=1) for level in reversed(range(supervised))
        )
        self.enlarge = nn.Upsample(scale_factor=2, mode="nearest")
        self.apply(_xavier)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of every region.

        Args:
            images: `[B, C, D, H, W]`, each of D, H, W divisible by `size_divisor`.

        Returns:
            Logits `[B, R, D, H, W]`.

        Raises:
            InputError: a wrong number of axes or channels, an edge that is not divisible, or a volume so
                small that its coarsest grid is one voxel.
        """
        self._check(images)
        features = images
        skips: list[Tensor] = []
        for level in self.encoder:
            features = level(features)
            skips.append(features)
        skips.pop()
        maps: list[Tensor] = []
        first_head = len(self.decoder) - len(self.heads)
        for index, level in enumerate(self.decoder):
            features = level(features, skips.pop())
            if index >= first_head:
                maps.append(self.heads[index - first_head](features))
        logits = maps[0]
        for finer in maps[1:]:
            logits = self.enlarge(logits) + finer
        return logits

    def _check(self, images: Tensor) -> None:
        channels = cast(_EncoderLevel, self.encoder[0]).channels
        if images.ndim != 5 or images.shape[1] != channels:
            raise InputError(
                f"isensee2017: expected images [B, {channels}, D, H, W] (got {list(images.shape)})"
            )
        if any(edge % self.size_divisor for edge in images.shape[2:]):
            raise InputError(
                f"isensee2017: every edge of the image must be divisible by {self.size_divisor} "
                f"(got {list(images.shape[2:])}); pad it or use timm_ext.inference"
            )
        if all(edge == self.size_divisor for edge in images.shape[2:]):
            # The coarsest grid would be one voxel, of which an instance norm has no variance.
            raise InputError(
                f"isensee2017: one edge of the image must be longer than {self.size_divisor} "
                f"(got {list(images.shape[2:])})"
            )


class _Block(nn.Sequential):
    """Convolution, instance norm, LeakyReLU."""

    def __init__(
        self, in_channels: int, out_channels: int, slope: float, kernel_size: int = 3, stride: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2)
        self.norm = nn.InstanceNorm3d(out_channels, affine=True)
        self.activation = nn.LeakyReLU(slope, inplace=True)


class _EncoderLevel(nn.Module):
    """A block that may halve the grid, followed by a residual context module."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, dropout: float, slope: float
    ) -> None:
        super().__init__()
        self.channels = in_channels
        self.entry = _Block(in_channels, out_channels, slope, stride=stride)
        self.context1 = _Block(out_channels, out_channels, slope)
        self.dropout = nn.Dropout3d(dropout)
        self.context2 = _Block(out_channels, out_channels, slope)

    def forward(self, features: Tensor) -> Tensor:
        entered: Tensor = self.entry(features)
        context: Tensor = self.context2(self.dropout(self.context1(entered)))
        return entered + context


class _DecoderLevel(nn.Module):
    """Upsampling by two, concatenation with the encoder's features, localisation."""

    def __init__(self, in_channels: int, out_channels: int, slope: float) -> None:
        super().__init__()
        self.enlarge = nn.Upsample(scale_factor=2, mode="nearest")
        self.upsample = _Block(in_channels, out_channels, slope)
        self.localise3 = _Block(2 * out_channels, out_channels, slope)
        self.localise1 = _Block(out_channels, out_channels, slope, kernel_size=1)

    def forward(self, features: Tensor, skip: Tensor) -> Tensor:
        raised = self.upsample(self.enlarge(features))
        localised: Tensor = self.localise1(self.localise3(torch.cat([skip, raised], dim=1)))
        return localised


def _xavier(module: nn.Module) -> None:
    if isinstance(module, nn.Conv3d):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _check_options(
    in_channels: int, out_channels: int, base_filters: int, levels: int, dropout: float
) -> None:
    counts = {"in_channels": in_channels, "out_channels": out_channels, "base_filters": base_filters}
    for name, value in counts.items():
        if value < 1:
            raise InputError(f"isensee2017: {name} must be at least 1 (got {value})")
    if levels < 2:
        raise InputError(f"isensee2017: levels must be at least 2 (got {levels})")
    if levels > MOST_LEVELS:
        raise InputError(f"isensee2017: levels must be at most {MOST_LEVELS} (got {levels})")
    if not 0 <= dropout < 1:
        raise InputError(f"isensee2017: dropout must lie in [0, 1) (got {dropout})")
