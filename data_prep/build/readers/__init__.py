"""What `build` reads: each reader cuts an input into tasks, and makes a task's records in a worker."""
