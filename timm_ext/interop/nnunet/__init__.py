"""nnU-Net v2: its plans, checkpoints and model folders."""
