"""The data pipeline: tar, index, cache, order, decoding, views, source and loader, as numbered in each module's first line."""
