"""Quality, recall, memory and speed of a model, each measured through the cache that it really uses."""
