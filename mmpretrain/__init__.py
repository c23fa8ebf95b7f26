"""Multimodal image-text pretraining: objectives that compose, over captioned and uncaptioned shards."""

__version__ = "0.1.0"
