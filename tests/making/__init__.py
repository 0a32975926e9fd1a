"""What tests are made of: tiny models, statistics, checkpoints, bad inputs and damage by hand, and slow oracles."""
