"""MONAI: bundles, checkpoints of Auto3DSeg, and files that MONAI takes."""
