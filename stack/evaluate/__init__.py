"""Evaluation: sampling from snapshots, validation loss, and the detector that judges drawn scenes."""
