"""Networks: MM-DiT, its presets and what it costs."""
