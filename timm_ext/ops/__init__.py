"""The operators: for each a documented function, its fake kernel, and its twin in `reference`."""

from timm_ext._moved import names_before

__getattr__ = names_before(__name__)
