"""Building blocks: attention, norms, the text encoder, the autoencoder. None depends on a model family."""
