"""The loop from a written contract to a proven small model: one folder per stage, plain Python under pytest."""
