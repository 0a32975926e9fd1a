"""Grouped products of many rows with many matrices, by regime and device."""
