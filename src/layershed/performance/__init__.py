"""Measures and predicts speed and size, and drops to a target speedup."""
