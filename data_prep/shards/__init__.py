"""Reading and writing of shards, shared by the commands."""
