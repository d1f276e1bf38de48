"""Nodes of the autograd graph: layers whose call decides what becomes of their parameters' gradients.

A node keeps the input of its layer. When the gradient of the layer's output arrives, it offers the call the
gradients of the parameters, example by example or as a sum, and passes the input's gradient down.
"""

from timm_ext.layers.nodes.activation import ActivatedNode, PReLUNode
from timm_ext.layers.nodes.affine import AffineNode, LayerNormNode
from timm_ext.layers.nodes.convolution import ConvolutionNode, UpsampledConvolutionNode
from timm_ext.layers.nodes.linear import LinearNode
from timm_ext.layers.nodes.norm import BatchNormNode, GroupNormNode
from timm_ext.layers.nodes.upsampling import TrilinearNode, UpsampleNode

__all__ = [
    "ActivatedNode",
    "AffineNode",
    "BatchNormNode",
    "ConvolutionNode",
    "GroupNormNode",
    "LayerNormNode",
    "LinearNode",
    "PReLUNode",
    "TrilinearNode",
    "UpsampleNode",
    "UpsampledConvolutionNode",
]
