"""What is learned: estimators on features. Nothing here yet; the demo fits scikit-learn's own."""
