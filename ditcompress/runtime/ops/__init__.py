"""The operations that run packed weights: one file an op, each with a plain version it is tested against."""
