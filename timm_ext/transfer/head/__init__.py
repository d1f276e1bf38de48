"""Heads fitted to a few labelled cases as a convex problem, and the evidence of what is in front of them."""

from timm_ext.transfer.head.fitted import FittedHead, HeadSamples, drawn_cases, fit_head

__all__ = ["FittedHead", "HeadSamples", "drawn_cases", "fit_head"]
