"""The command `filter`: the samples that pass rules."""
