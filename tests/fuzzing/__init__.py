"""Damages everything that Locum reads, gives the command line senseless values, and counts what Locum answers: `make fuzz`."""
