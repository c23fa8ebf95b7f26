"""The command `validate`: problems of shards, and their repair."""
