"""Host side: images by index, in a seeded order, as uint8 batches."""
