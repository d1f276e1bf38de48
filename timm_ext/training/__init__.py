"""Training: one trainer, and the stages of the method on top of it."""
