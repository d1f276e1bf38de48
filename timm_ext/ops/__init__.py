"""The operators: for each a documented function, its fake kernel, and its twin in `reference`."""

import timm_ext
from timm_ext._moved import names_before
from timm_ext.ops._library import load_library

load_library(timm_ext.__path__, timm_ext.__version__)
__getattr__ = names_before(__name__)
