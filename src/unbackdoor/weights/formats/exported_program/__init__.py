"""Programs of ``torch.export`` (.pt2), read as data."""
