"""One attention as tensors, and the only place of its mathematics."""
