"""The mathematics of caches that several layers read."""
