"""Qwen-Image 2.1: a transformer of 7B, text through Qwen3-VL-8B, an autoencoder of four channels with transparency."""
