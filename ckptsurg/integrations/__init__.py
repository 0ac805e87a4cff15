"""Frameworks that train: PyTorch and Keras, and a file for each trainer over PyTorch."""
