"""The page: one HTML file that shows what a depth benchmark or an evaluation found, without a network."""
