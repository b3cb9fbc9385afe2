"""Blocks: attention, norms, the text encoder, the autoencoder. Nothing here knows a model family."""
