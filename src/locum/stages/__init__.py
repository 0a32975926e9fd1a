"""The stages: each a function from files to files, and a command."""
