"""What frameworks hold in memory, as named tensors: one file each. Formats and integrations both stand on it."""
