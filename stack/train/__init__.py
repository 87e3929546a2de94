"""The training loop, its objectives, checkpoints and metrics."""
