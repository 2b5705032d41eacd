"""Training: one file per loop, and `run`, which holds what they share."""
