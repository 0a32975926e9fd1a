"""Checkpoints that are bigger than memory, and what Locum needs for them."""
