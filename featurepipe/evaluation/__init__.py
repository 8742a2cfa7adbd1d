"""How good a bundle is, on features it has not seen."""
