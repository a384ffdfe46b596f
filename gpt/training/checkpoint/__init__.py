"""Checkpoints: their format, writing and retention."""
