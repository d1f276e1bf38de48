"""Data sets on disk in the formats of others: BraTS, nnU-Net, Decathlon, BIDS, CSV and JSON lists."""
