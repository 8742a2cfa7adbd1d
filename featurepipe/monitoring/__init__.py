"""What is odd about a dataset's images, as their features show it: drift from night to night, copies, near copies."""
