"""Z-Image (arXiv 2511.22699): a single-stream transformer, a Qwen3 text encoder, FLUX.1's autoencoder."""
