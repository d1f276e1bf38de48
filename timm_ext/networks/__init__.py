"""Segmentation networks by name, and their files."""

from timm_ext.networks.channel_trace import trace_channels
from timm_ext.networks.channels import ChannelMap
from timm_ext.networks.io import load_network, save_network
from timm_ext.networks.isensee2017 import Isensee2017
from timm_ext.networks.registry import (
    NetworkSpec,
    build_network,
    heads_of,
    input_layer_of,
    input_layers_of,
    network_names,
    network_spec,
    register_network,
    size_divisor_of,
)
from timm_ext.networks.reset import reset_specific

__all__ = [
    "ChannelMap",
    "Isensee2017",
    "NetworkSpec",
    "build_network",
    "heads_of",
    "input_layer_of",
    "input_layers_of",
    "load_network",
    "network_names",
    "network_spec",
    "register_network",
    "reset_specific",
    "save_network",
    "size_divisor_of",
    "trace_channels",
]
