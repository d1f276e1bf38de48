"""What is in files of networks: their notes, digests and tensors, ours and those of other tools."""
