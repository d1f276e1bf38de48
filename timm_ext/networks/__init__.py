"""Segmentation networks by name, and their files."""
