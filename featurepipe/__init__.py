"""featurepipe: a frozen ConvNet as a fixed feature extractor."""

__version__ = "0.1.0"
