"""Captions: tokenizers, frozen encoders, and the context that the transformer attends to."""
