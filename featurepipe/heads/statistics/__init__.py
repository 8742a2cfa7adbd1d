"""What scores, features and repeated measurements say: metrics, intervals, comparisons, tests, and scores of whole layers."""
