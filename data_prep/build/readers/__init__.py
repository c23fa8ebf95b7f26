"""Readers of `build`: each divides an input into tasks, and makes the records of a task in a worker."""
