"""Read the attention of a model from its graph."""
