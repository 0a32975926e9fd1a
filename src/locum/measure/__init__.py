"""What a model is asked: statistics, removals, loss, tasks, costs."""
