"""Layers: attention behind one function, norms, modulation, embeddings, rotary positions."""
