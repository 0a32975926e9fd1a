"""Comparisons of trained models, by methods, sizes and seeds."""
