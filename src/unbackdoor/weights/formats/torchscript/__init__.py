"""TorchScript archives, read as data."""
