"""Frameworks that train: PyTorch, and a file for each trainer over it."""
