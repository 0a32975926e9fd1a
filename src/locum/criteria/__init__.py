"""Scores of experts: one number per expert, higher means keep."""
