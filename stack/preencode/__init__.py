"""Encoding captioned images once, ahead of training."""
