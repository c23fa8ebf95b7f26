"""The command `demo`: the shards of the demo benchmark, rendered from seeds."""
