"""FLUX.3 Image klein: a transformer of 5.5B, text through Qwen3-VL-4B, FLUX.2's autoencoder."""
