"""The planner: one byte budget in, the best composition of methods over layers and axes out."""
