"""finetune: the layers above a node tuned to the user's images, from activations that the store holds."""
