"""The command `dedup`: search for exact and near-duplicate images, and their removal."""
