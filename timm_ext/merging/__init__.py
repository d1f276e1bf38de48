"""Merging of source models: the bank, the merged model, and the table of merges."""

from timm_ext._moved import names_before
from timm_ext.merging.alignment import Alignment, align, align_to_first
from timm_ext.merging.bank import Bank, FisherStorage, Normalization
from timm_ext.merging.barrier import LossPath, loss_along_merge
from timm_ext.merging.combine import LogitEnsemble, uniform_soup
from timm_ext.merging.initialise import assemble_bank, build_initialisation
from timm_ext.merging.merge import MERGES, Merge, get_merge, merges
from timm_ext.merging.merged_model import MergedModel
from timm_ext.merging.mixing import Mixing, anchored_logits, logits_of, squared_departure
from timm_ext.merging.modalities import fit_to_target, match_input_channels, same_modality, unseen_modalities
from timm_ext.merging.refit import Channels, Refit, refit

__all__ = [
    "MERGES",
    "Alignment",
    "Bank",
    "Channels",
    "FisherStorage",
    "LogitEnsemble",
    "LossPath",
    "Merge",
    "MergedModel",
    "Mixing",
    "Normalization",
    "Refit",
    "align",
    "align_to_first",
    "anchored_logits",
    "assemble_bank",
    "build_initialisation",
    "fit_to_target",
    "get_merge",
    "logits_of",
    "loss_along_merge",
    "match_input_channels",
    "merges",
    "refit",
    "same_modality",
    "squared_departure",
    "uniform_soup",
    "unseen_modalities",
]

__getattr__ = names_before(__name__)
