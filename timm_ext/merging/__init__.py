"""Merging of source models: the bank, the merged model, and the registry of methods."""

from timm_ext.merging.bank import Bank, FisherStorage, Normalization
from timm_ext.merging.initialise import assemble_bank, build_initialisation
from timm_ext.merging.merged_model import MergedModel, logits_of
from timm_ext.merging.methods import METHODS, Method, get_method, method_names
from timm_ext.merging.modalities import fit_to_target, match_input_channels

__all__ = [
    "METHODS",
    "Bank",
    "FisherStorage",
    "MergedModel",
    "Method",
    "Normalization",
    "assemble_bank",
    "build_initialisation",
    "fit_to_target",
    "get_method",
    "logits_of",
    "match_input_channels",
    "method_names",
]
