"""The names of modalities and regions, and which of them mean the same."""
