"""`python -m timm_ext` is the command `timm-ext`."""

from timm_ext.cli import main

main()
