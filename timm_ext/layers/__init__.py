"""Layers in place of PyTorch's: one set of autograd nodes for training, inference and the Fisher."""

from timm_ext.layers.choice import layers_on, memory_on
from timm_ext.layers.fast import fast_layers
from timm_ext.layers.told import paths_told

__all__ = ["fast_layers", "layers_on", "memory_on", "paths_told"]
