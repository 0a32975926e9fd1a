"""What becomes of every expert: data, checks, sizes and the plan's file."""
