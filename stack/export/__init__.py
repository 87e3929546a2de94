"""Writing trained weights for others to read."""
