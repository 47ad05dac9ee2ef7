"""The mathematics of fewer tokens."""
