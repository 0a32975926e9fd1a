"""Other forms of a compressed checkpoint, for those who cannot import Locum."""
