"""Training: one trainer, what it makes small, and what watches it."""
