"""The command `stats`: a report of a shard set."""
