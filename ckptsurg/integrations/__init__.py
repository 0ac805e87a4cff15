"""Frameworks that train: one file each, over the same core."""
