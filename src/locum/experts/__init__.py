"""What stands in for one expert: weights and their arithmetic, and the policies that say which experts run."""
