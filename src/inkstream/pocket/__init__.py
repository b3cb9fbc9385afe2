"""Pocket: pictures that the project renders itself, and the small Z-Image trained on them."""
