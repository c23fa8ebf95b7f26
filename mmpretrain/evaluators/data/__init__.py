"""Data sets of evaluators: items, labels and class names."""
