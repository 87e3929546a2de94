"""What a transformer block does between its matrix products, each fused into one pass over the tokens."""
