"""Data sets: records, augmentation, near-duplicates, encoding, batches."""
