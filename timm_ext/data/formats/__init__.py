"""Data sets on disk in the formats of others: BraTS, nnU-Net, Decathlon, CSV and JSON lists."""
