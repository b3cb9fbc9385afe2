"""Pocket: pictures that inkstream renders itself, and the small Z-Image model trained on them."""
