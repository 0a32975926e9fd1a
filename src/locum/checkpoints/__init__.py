"""Checkpoint folders: read, loaded, converted, applied to, saved and described."""
