"""The folder that predicts on images: written once, audited before it is read, no code in it (BUNDLE.md)."""
