"""FLUX.1: a 12B transformer over T5 and CLIP text, 16-channel latents at an eighth of the picture's side."""
