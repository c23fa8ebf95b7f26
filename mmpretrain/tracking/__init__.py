"""Metrics, results, pictures and console output of a run."""
