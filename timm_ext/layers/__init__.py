"""Layers in place of PyTorch's: one set of autograd nodes for training, inference and the Fisher."""

from timm_ext.layers.fast import fast_layers

__all__ = ["fast_layers"]
