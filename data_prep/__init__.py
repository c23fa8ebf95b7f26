"""Preparation of data: one package per command of `python -m data_prep`, over shared readers, writers and engines."""
