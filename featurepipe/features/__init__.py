"""Images to features, with or without a store: sessions, settings of a feature space, loading, streams."""
