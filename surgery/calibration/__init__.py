"""What conversion reads from text: token windows, statistics, and the copy of the model that is converted."""
