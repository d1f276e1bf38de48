"""From source networks to a network for a new task: start, adaptation and fine-tuning."""
