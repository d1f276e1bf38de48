"""`python -m timm_ext` is the command `timm-ext`."""

from timm_ext.cli import main

if __name__ == "__main__":
    main()
