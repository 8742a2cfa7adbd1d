"""CNNFeatures: a frozen network as a scikit-learn transformer over images."""
