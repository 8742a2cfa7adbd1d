"""Which layer transfers best: every layer measured alike, in one pass over the images, and what follows from it."""
