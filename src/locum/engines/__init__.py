"""Engines that serve Locum's checkpoints, and what runs inside them."""
