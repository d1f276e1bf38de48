"""The machine the program runs on: memory, terminal, locks, signals and processes."""
