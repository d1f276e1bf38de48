"""The networks that benchmarks run: of nnU-Net, of MONAI and of the paper, from four images to three maps."""

from collections.abc import Callable
from typing import Any

import torch
from monai.networks import nets
from torch import Tensor, nn

from timm_ext.networks import build_network

INPUTS, OUTPUTS = 4, 3
Build = Callable[[], nn.Module]


def isensee2017(base: int) -> Build:
    """The network of BraTS 2017."""
    channels = {"in_channels": INPUTS, "out_channels": OUTPUTS}
    return lambda: build_network("isensee2017", **channels, base_filters=base, seed=0)


def nnunet(name: str, features: tuple[int, ...], deep_supervision: bool) -> Build:
    """A network as nnU-Net plans it: instance norms, LeakyReLU, strides of 2.

    `dynamic-network-architectures` is imported when the network is built; what it requires beside PyTorch is
    for its other networks (`pip install --no-deps dynamic-network-architectures`).
    """

    def build() -> nn.Module:
        from dynamic_network_architectures.architectures import unet

        stages = len(features)
        depth: dict[str, Any] = {"n_conv_per_stage": 2}
        if name == "ResidualEncoderUNet":
            depth = {"n_blocks_per_stage": (1, 3, 4, 6, 6)[:stages]}
        network: nn.Module = getattr(unet, name)(
            INPUTS,
            stages,
            features,
            nn.Conv3d,
            3,
            (1, *(2,) * (stages - 1)),
            num_classes=OUTPUTS,
            n_conv_per_stage_decoder=2 if name == "PlainConvUNet" else 1,
            conv_bias=True,
            norm_op=nn.InstanceNorm3d,
            norm_op_kwargs={"eps": 1e-5, "affine": True},
            nonlin=nn.LeakyReLU,
            nonlin_kwargs={"inplace": True},
            deep_supervision=deep_supervision,
            **depth,
        )
        return network

    return build


def monai(name: str, *arguments: Any, **settings: Any) -> Build:
    """A network of MONAI."""
    return lambda: getattr(nets, name)(*arguments, **settings)


CHANNELS = {"in_channels": INPUTS, "out_channels": OUTPUTS}
BUILDERS: dict[str, Build] = {
    "isensee2017 8": isensee2017(8),
    "isensee2017 16": isensee2017(16),
    "PlainConvUNet 32-256": nnunet("PlainConvUNet", (32, 64, 128, 256), False),
    "PlainConvUNet 32-256, deep supervision": nnunet("PlainConvUNet", (32, 64, 128, 256), True),
    "ResidualEncoderUNet 32-320": nnunet("ResidualEncoderUNet", (32, 64, 128, 256, 320), False),
    "ResidualEncoderUNet 32-320, deep supervision": nnunet(
        "ResidualEncoderUNet", (32, 64, 128, 256, 320), True
    ),
    "DynUNet 32-256": monai(
        "DynUNet", 3, INPUTS, OUTPUTS, [3] * 4, [1, 2, 2, 2], [2, 2, 2], filters=[32, 64, 128, 256]
    ),
    "SegResNet 16": monai("SegResNet", init_filters=16, **CHANNELS),
    "SegResNetDS 16": monai("SegResNetDS", init_filters=16, **CHANNELS),
    "UNet 16-128": monai("UNet", 3, INPUTS, OUTPUTS, (16, 32, 64, 128), (2, 2, 2), num_res_units=2),
    "BasicUNet 16-128": monai("BasicUNet", 3, INPUTS, OUTPUTS, (16, 16, 32, 64, 128, 16)),
    "BasicUNetPlusPlus 16-128": monai("BasicUNetPlusPlus", 3, INPUTS, OUTPUTS, (16, 16, 32, 64, 128, 16)),
    "AttentionUnet 16-128": monai("AttentionUnet", 3, INPUTS, OUTPUTS, (16, 32, 64, 128), (2, 2, 2)),
    "SwinUNETR 12": monai("SwinUNETR", feature_size=12, **CHANNELS),
    "UNETR of 64": monai("UNETR", img_size=64, hidden_size=192, mlp_dim=768, num_heads=6, **CHANNELS),
    "VNet": monai("VNet", **CHANNELS),
    "MedNeXt 16": monai("MedNeXt", init_filters=16, kernel_size=7, **CHANNELS),
}


def seeded(build: Build) -> Build:
    """The same network each time, its dropout off, so that all ways to run it do the same work."""

    def network() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = build().train()
        for module in made.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
        return made

    return network


NETWORKS: dict[str, Build] = {name: seeded(build) for name, build in BUILDERS.items()}

LEAST_EDGE = {"SwinUNETR 12": 64, "UNETR of 64": 64}  # of an image; 32 for the others
# Coarsest grids of 3³: on 2³ oneDNN's bfloat16 weight gradients are of memory that nobody wrote.
EDGE_OF_HALF = {
    name: 48
    for name in NETWORKS
    if name.startswith(("isensee2017", "ResidualEncoderUNet", "BasicUNet", "VNet", "MedNeXt"))
}


def check_edge(name: str, edge: int) -> None:
    """Refuse images that a network does not take, before anything is timed."""
    images, _ = draw(1, edge, device="meta")
    model = NETWORKS[name]().to("meta")
    try:
        model(images)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise SystemExit(f"{name}: expected images that it takes (got an edge of {edge}: {reason})") from None


def heads(output: Any) -> list[Tensor]:
    """All maps of logits of a network's output, the finest first: several under deep supervision."""
    return [output] if isinstance(output, Tensor) else list(output)


def draw(
    batch: int, edge: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Images `[batch, 4, edge, edge, edge]`, normal, and labels `[batch, 3, edge, edge, edge]`, 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, INPUTS, edge, edge, edge, generator=generator)
    labels = torch.rand(batch, OUTPUTS, edge, edge, edge, generator=generator) < 0.3
    return images.to(device, dtype), labels.to(device, dtype)
