"""Kills commands at random moments, runs them again, and compares what they leave with an uninterrupted run: `make kill-test`."""
