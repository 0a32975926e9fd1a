"""Speed and memory of a checkpoint beside its original."""
