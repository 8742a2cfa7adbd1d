"""A bundle at work: images in, labels and probabilities out."""
