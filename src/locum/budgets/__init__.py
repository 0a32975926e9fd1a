"""How much goes where: from a target to counts, ranks, thresholds and sets."""
