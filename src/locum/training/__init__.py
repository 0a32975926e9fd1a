"""Training a compressed model back to strength."""
