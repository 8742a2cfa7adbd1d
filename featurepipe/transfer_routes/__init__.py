"""``featurepipe routes``: use a network as it is, freeze it, or tune it? Measured on the user's own images."""
