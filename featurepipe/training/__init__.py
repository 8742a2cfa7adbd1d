"""Stage two: cached features to a head, kept in a bundle."""
