"""Data sets, seeded splits, batches that stay where the pixels lie, augmentation."""
