"""How sparse the activations of a trained model are and may become: what ``clframe analyse sparsity`` does."""
