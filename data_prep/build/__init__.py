"""The command `build`: shards from folders, tables, annotation files and other shards."""
