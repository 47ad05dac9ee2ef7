"""What several methods share: refits, gains, moments, and the division of a budget among layers."""
