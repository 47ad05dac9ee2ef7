"""Weights in, weights out: one file per method."""
