"""Programs behind every figure, and their results. README.md says which program makes which file."""
