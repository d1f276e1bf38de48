"""Small networks of MONAI, and how users name them."""

from timm_ext.networks.registry import build_network

SEGRESNET = {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]}
DYNUNET = {
    "spatial_dims": 3,
    "kernel_size": [3, 3, 3, 3],
    "strides": [1, 2, 2, 2],
    "upsample_kernel_size": [2, 2, 2],
    "filters": [4, 8, 8, 8],
}
TINY = "SegResNet:init_filters=8,blocks_down=[1,1],blocks_up=[1]"


def spelled(name, options):
    return f"{name}:" + ",".join(f"{key}={value}" for key, value in options.items())


def segresnet(seed, channels=2, outputs=7):
    return build_network(
        "monai.SegResNet", in_channels=channels, out_channels=outputs, seed=seed, **SEGRESNET
    ).eval()
