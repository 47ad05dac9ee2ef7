"""The mathematics of codecs that are calibrated."""
