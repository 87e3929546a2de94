"""Data: the sample contract, shards, the batch plan, data sets and drawn scenes."""
