"""The mathematics: features, embeddings, interactions, losses, metrics, optimisers."""
