"""Checkpoints on disk and the models that are given as parents: checked, read, written complete or not at all."""
