"""What a plan stands on: budgets, layouts, and what the classes and engines of others can say."""
