"""The mathematics of fewer KV heads."""
