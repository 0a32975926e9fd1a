"""What calibration counts: events, the statistics made of them, their sums and files."""
